// Routed experts of a few rows: rows grouped by expert, so that each visited expert's weights are read once.
#pragma once

#include "program.h"

struct ExpertScratch {
    std::vector<int64_t> first;    // of each expert in `visits`
    std::vector<int64_t> visits;   // row * k + rank, by expert
    std::vector<bf16> inner, gated, outputs;
};

// One matrix [O, I] of each expert times the rows that visit it. Few rows are shared out by outputs, so that each thread
// reads its part of the weights; many by rows, so that each packs its own.
template <class Input>
static void visit_experts(const ExpertScratch& scratch, int64_t experts, const Input& input, const bf16* weights, int64_t outputs,
                          int64_t depth, bf16* out, const Team& team) {
    constexpr int64_t MANY = 64;
    static thread_local std::vector<const bf16*> x;
    for (int64_t e = 0; e < experts; ++e) {
        int64_t first = scratch.first[e], last = scratch.first[e + 1], begin = 0, end = outputs;
        if (last - first >= MANY) {
            const int64_t all = last - first, offset = first;
            split(all, 16, team.id, team.threads, &first, &last);
            first += offset, last += offset;
        } else {
            split(outputs, 16, team.id, team.threads, &begin, &end);
        }
        if (first == last || begin == end) continue;
        x.clear();
        for (int64_t visit = first; visit < last; ++visit) x.push_back(input(visit));
        multiply_rows(x.data(), last - first, weights + e * outputs * depth, begin, end, depth, StoreBf16{out + first * outputs, outputs});
    }
}

// [x, chosen, weights, k, gate_up [E][2F][H], down [E][H][F], E, H, F, residual, visits or 0]
// Adds the weighted sum of a row's experts, in the order of their ranking, to its fp32 residual.
inline void experts(const Op& op, const Batch& batch, const Team& team) {
    static ExpertScratch scratch;  // one call at a time: see autan_run_program
    const int64_t k = op.v[3], experts = op.v[6], hidden = op.v[7], width = op.v[8], visits = batch.rows * k;
    const int32_t* chosen = op.at<int32_t>(1);
    if (team.id == 0) {
        scratch.first.assign(experts + 1, 0);
        for (int64_t i = 0; i < visits; ++i) ++scratch.first[chosen[i] + 1];
        for (int64_t e = 0; e < experts; ++e) {
            if (op.v[10]) op.at<int64_t>(10)[e] += scratch.first[e + 1];
            scratch.first[e + 1] += scratch.first[e];
        }
        scratch.visits.resize(visits);
        std::vector<int64_t> next(scratch.first.begin(), scratch.first.end() - 1);
        for (int64_t i = 0; i < visits; ++i) scratch.visits[next[chosen[i]]++] = i;
        if ((int64_t)scratch.inner.size() < visits * 2 * width) scratch.inner.resize(visits * 2 * width);
        if ((int64_t)scratch.gated.size() < visits * width) scratch.gated.resize(visits * width);
        if ((int64_t)scratch.outputs.size() < visits * hidden) scratch.outputs.resize(visits * hidden);
    }
    team.barrier->wait();
    const auto input = [&](int64_t visit) { return op.at<bf16>(0) + scratch.visits[visit] / k * hidden; };
    visit_experts(scratch, experts, input, op.at<bf16>(4), 2 * width, hidden, scratch.inner.data(), team);
    team.barrier->wait();
    for (int64_t i = team.id; i < visits; i += team.threads)
        gate_row(scratch.inner.data() + i * 2 * width, width, scratch.gated.data() + i * width);
    team.barrier->wait();
    const auto gated = [&](int64_t visit) { return scratch.gated.data() + visit * width; };
    visit_experts(scratch, experts, gated, op.at<bf16>(5), hidden, width, scratch.outputs.data(), team);
    team.barrier->wait();
    static std::vector<int64_t> place;
    if (team.id == 0) {
        place.resize(visits);
        for (int64_t i = 0; i < visits; ++i) place[scratch.visits[i]] = i;
    }
    team.barrier->wait();
    for (int64_t m = team.id; m < batch.rows; m += team.threads)
        for (int64_t i = 0; i < hidden; i += 16) {
            const int rest = (int)(hidden - i < 16 ? hidden - i : 16);
            float* out = op.at<float>(9) + m * hidden + i;
            __m512 sum = load_f32(out, rest);
            for (int64_t r = 0; r < k; ++r) {
                const __m512 weight = _mm512_set1_ps(op.at<float>(2)[m * k + r]);
                sum = _mm512_fmadd_ps(load_wide(scratch.outputs.data() + place[m * k + r] * hidden + i, rest), weight, sum);
            }
            store_f32(out, sum, rest);
        }
}
