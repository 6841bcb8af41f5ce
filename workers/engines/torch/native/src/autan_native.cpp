// The library's entry points: a decode step in one call, and the attention of a chunk of a prompt.

#include "experts.h"
#include "flash_prefill.h"
#include "program.h"

#include <omp.h>

#include <mutex>

namespace {

// [x, table, width]: fp32 residual rows from the bf16 embedding.
void embed(const Op& op, const Batch& batch, const Team& team) {
    const int64_t width = op.v[2];
    for (int64_t m = team.id; m < batch.rows; m += team.threads) {
        const bf16* row = op.at<bf16>(1) + batch.token_ids[m] * width;
        for (int64_t i = 0; i < width; i += 16)
            store_f32(op.at<float>(0) + m * width + i, load_wide(row + i, (int)(width - i)), (int)(width - i));
    }
}

// [x, weight, out, width, eps, x is bf16, x stride]
void norm(const Op& op, const Batch& batch, const Team& team) {
    const int64_t width = op.v[3];
    for (int64_t m = team.id; m < batch.rows; m += team.threads) {
        bf16* out = op.at<bf16>(2) + m * width;
        if (op.v[5]) norm_bf16(op.at<bf16>(0) + m * op.v[6], op.at<bf16>(1), op.number(4), width, out);
        else norm_f32(op.at<float>(0) + m * op.v[6], op.at<bf16>(1), op.number(4), width, out);
    }
}

template <class Emit>
void multiply(const Op& op, const Batch& batch, int64_t first, int64_t last, const Team& team, const Emit& emit) {
    const int64_t depth = op.v[3];
    if (op.v[5]) {
        // Each thread quantises all rows for itself: cheaper than meeting the others.
        const int64_t padded = (depth + 63) / 64 * 64;
        static thread_local std::vector<int8_t> planes;
        static thread_local std::vector<ByteRow> rows;
        planes.resize(batch.rows * 2 * padded + 64);
        rows.clear();
        for (int64_t m = 0; m < batch.rows; ++m)
            rows.push_back(quantise_row(op.at<bf16>(0) + m * depth, depth, planes.data() + m * 2 * padded));
        byte_rows(rows.data(), batch.rows, op.at<int8_t>(1), op.at<float>(5), first, last, depth, emit);
        return;
    }
    static thread_local std::vector<const bf16*> x;
    x.clear();
    for (int64_t m = 0; m < batch.rows; ++m) x.push_back(op.at<bf16>(0) + m * depth);
    multiply_rows(x.data(), batch.rows, op.at<bf16>(1), first, last, depth, emit);
}

// [x, weight, out, I, O, scales or 0, result: 0 bf16, 1 fp32, 2 added to fp32]
void linear(const Op& op, const Batch& batch, const Team& team) {
    int64_t first, last;
    split(op.v[4], 16, team.id, team.threads, &first, &last);
    if (first == last) return;
    if (op.v[6] == 0) multiply(op, batch, first, last, team, StoreBf16{op.at<bf16>(2), op.v[4]});
    else if (op.v[6] == 1) multiply(op, batch, first, last, team, StoreF32{op.at<float>(2), op.v[4]});
    else multiply(op, batch, first, last, team, AddF32{op.at<float>(2), op.v[4]});
}

// [out [rows][dim], inverse frequencies, dim / 2]: cosines and sines of each row's position.
void rope_tables(const Op& op, const Batch& batch, const Team& team) {
    const int64_t half = op.v[2];
    for (int64_t m = team.id; m < batch.rows; m += team.threads)
        for (int64_t i = 0; i < half; ++i) {
            const float angle = (float)batch.positions[m] * op.at<float>(1)[i];
            op.at<float>(0)[m * 2 * half + i] = std::cos(angle);
            op.at<float>(0)[m * 2 * half + half + i] = std::sin(angle);
        }
}

// [qkv [rows][(N + 2K) D], tables, N, K, D, interleaved, factor, pool offset, pool row]: rotates q in place, stores k and v.
void rotate_gqa(const Op& op, const Batch& batch, const Team& team) {
    const int64_t heads = op.v[2], kv_heads = op.v[3], dim = op.v[4];
    for (int64_t m = team.id; m < batch.rows; m += team.threads) {
        bf16* row = op.at<bf16>(0) + m * (heads + 2 * kv_heads) * dim;
        const float* tables = op.at<float>(1) + m * dim;
        bf16* kv = batch.pool + op.v[7] + batch.slots[m] * op.v[8];
        for (int64_t h = 0; h < heads; ++h) rotate_head(row + h * dim, tables, dim, op.v[5], op.number(6), row + h * dim);
        const bf16* keys = row + heads * dim;
        for (int64_t h = 0; h < kv_heads; ++h) rotate_head(keys + h * dim, tables, dim, op.v[5], op.number(6), kv + h * dim);
        std::memcpy(kv + kv_heads * dim, keys + kv_heads * dim, kv_heads * dim * sizeof(bf16));
    }
}

// [gate_up, out, F]
void gate(const Op& op, const Batch& batch, const Team& team) {
    for (int64_t m = team.id; m < batch.rows; m += team.threads)
        gate_row(op.at<bf16>(0) + m * 2 * op.v[2], op.v[2], op.at<bf16>(1) + m * op.v[2]);
}

// [down [rows][Q + R + P], q norm, q out, Q, kv norm, R, P, tables, interleaved, factor, eps, pool offset, pool row]
void split_latent(const Op& op, const Batch& batch, const Team& team) {
    const int64_t query = op.v[3], rank = op.v[5], rope = op.v[6];
    for (int64_t m = team.id; m < batch.rows; m += team.threads) {
        const bf16* row = op.at<bf16>(0) + m * (query + rank + rope);
        bf16* kv = batch.pool + op.v[11] + batch.slots[m] * op.v[12];
        norm_bf16(row, op.at<bf16>(1), op.number(10), query, op.at<bf16>(2) + m * query);
        norm_bf16(row + query, op.at<bf16>(4), op.number(10), rank, kv);
        rotate_head(row + query + rank, op.at<float>(7) + m * rope, rope, op.v[8], op.number(9), kv + rank);
    }
}

// [q [rows][N][O + P], out [rows][N][R + P], tables, N, O, P, R, interleaved, factor, beta, positions per step]:
// scales q by its position and rotates it, in place; copies the rotated part behind the place of the latent query.
void rotate_mla(const Op& op, const Batch& batch, const Team& team) {
    const int64_t heads = op.v[3], nope = op.v[4], rope = op.v[5], rank = op.v[6];
    for (int64_t m = team.id; m < batch.rows; m += team.threads) {
        const float beta = op.number(9);
        const float scale = beta == 0 ? 1.0f : 1.0f + beta * std::log(1.0f + (float)(batch.positions[m] / op.v[10]));
        for (int64_t h = 0; h < heads; ++h) {
            bf16* q = op.at<bf16>(0) + (m * heads + h) * (nope + rope);
            scale_row(q, scale, nope, q);
            rotate_head(q + nope, op.at<float>(2) + m * rope, rope, op.v[7], op.number(8) * scale, q + nope);
            std::memcpy(op.at<bf16>(1) + (m * heads + h) * (rank + rope) + rank, q + nope, rope * sizeof(bf16));
        }
    }
}

// [x, x row, x head, weight [N][O][I], N, I, O, out, out row, out head]: one small matrix for each head.
void heads_linear(const Op& op, const Batch& batch, const Team& team) {
    static thread_local std::vector<const bf16*> x;
    for (int64_t h = team.id; h < op.v[4]; h += team.threads) {
        x.clear();
        for (int64_t m = 0; m < batch.rows; ++m) x.push_back(op.at<bf16>(0) + m * op.v[1] + h * op.v[2]);
        const bf16* w = op.at<bf16>(3) + h * op.v[5] * op.v[6];
        const int64_t depth = op.v[5];
        const StoreBf16 emit{op.at<bf16>(7) + h * op.v[9], op.v[8]};
        multiply_rows(x.data(), batch.rows, w, 0, op.v[6], depth, emit);
    }
}

// [scores [rows][E], chosen, weights, E, k, renormalise, factor]
void route(const Op& op, const Batch& batch, const Team& team) {
    for (int64_t m = team.id; m < batch.rows; m += team.threads)
        route_row(op.at<float>(0) + m * op.v[3], op.v[3], op.v[4], op.v[5], op.number(6), op.at<int32_t>(1) + m * op.v[4],
                  op.at<float>(2) + m * op.v[4]);
}

void run(const Op& op, const Batch& batch, const Team& team) {
    switch (op.code) {
        case EMBED: return embed(op, batch, team);
        case NORM: return norm(op, batch, team);
        case LINEAR: return linear(op, batch, team);
        case ROPE_TABLES: return rope_tables(op, batch, team);
        case ROTATE_GQA: return rotate_gqa(op, batch, team);
        case ATTEND: return attend(op, batch, team);
        case GATE: return gate(op, batch, team);
        case SPLIT_LATENT: return split_latent(op, batch, team);
        case ROTATE_MLA: return rotate_mla(op, batch, team);
        case HEADS_LINEAR: return heads_linear(op, batch, team);
        case ROUTE: return route(op, batch, team);
        case EXPERTS: return experts(op, batch, team);
    }
}

}  // namespace

// [q, out, N of a group, groups, D, V, key offset, key step, value offset, value step, scale, window, pool offset, row,
//  block, block tokens]; q: [rows][groups * N] rows of `q row stride` = v[16] values per batch row, out: [rows][groups * N][V].
void attend(const Op& op, const Batch& batch, const Team& team) {
    const DecodeShape shape{op.v[3], op.v[2], op.v[4], op.v[5], op.v[6], op.v[7], op.v[8], op.v[9], op.number(10), op.v[11]};
    const PagedRows paged{batch.pool + op.v[12], op.v[14], op.v[13], op.v[15]};
    static std::vector<float> max, sum, values;  // one call at a time: see autan_run_program
    static std::vector<int64_t> first_task;
    const int64_t heads = shape.groups * shape.heads;
    if (team.id == 0) {
        first_task.assign(1, 0);
        for (int64_t m = 0; m < batch.rows; ++m) {
            const int64_t seen = shape.window && batch.lengths[m] > shape.window ? shape.window : batch.lengths[m];
            first_task.push_back(first_task.back() + (seen + SPLIT_TOKENS - 1) / SPLIT_TOKENS);
        }
        const size_t partials = first_task.back() * heads;
        if (max.size() < partials) max.resize(partials), sum.resize(partials), values.resize(partials * shape.value_dim);
        if (values.size() < partials * shape.value_dim) values.resize(partials * shape.value_dim);
    }
    team.barrier->wait();
    const int64_t tasks = first_task.back() * shape.groups;
    int64_t row = 0;
    for (int64_t task = team.id; task < tasks; task += team.threads) {
        const int64_t part = task / shape.groups, group = task % shape.groups;
        while (first_task[row + 1] <= part) ++row;
        const int64_t start = shape.window && batch.lengths[row] > shape.window ? batch.lengths[row] - shape.window : 0;
        const int64_t first = start + (part - first_task[row]) * SPLIT_TOKENS;
        const int64_t last = first + SPLIT_TOKENS < batch.lengths[row] ? first + SPLIT_TOKENS : batch.lengths[row];
        const int64_t at = part * heads + group * shape.heads;
        const bf16* q = op.at<bf16>(0) + row * op.v[16] + group * shape.heads * shape.key_dim;
        attend_split(q, shape.key_dim, paged, batch.block_tables + row * batch.table_width, first, last, group, shape,
                     {&max[at], &sum[at], &values[at * shape.value_dim]});
    }
    team.barrier->wait();
    for (int64_t task = team.id; task < batch.rows * heads; task += team.threads) {
        const int64_t m = task / heads, head = task % heads, at = first_task[m] * heads + head;
        merge_splits(&max[at], &sum[at], &values[at * shape.value_dim], first_task[m + 1] - first_task[m], heads,
                     shape.value_dim, op.at<bf16>(1) + task * shape.value_dim);
    }
}

extern "C" {

// Runs the operations in order with so many threads. One call at a time works: the others wait, as scratch is shared.
void autan_run_program(const Op* ops, int64_t count, const Batch* batch, int64_t threads) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> alone(one_at_a_time);
    Barrier barrier;
    barrier.threads = (int)threads;
#pragma omp parallel num_threads((int)threads)
    {
        const Team team{omp_get_thread_num(), (int)threads, &barrier};
        for (int64_t i = 0; i < count; ++i) {
            run(ops[i], *batch, team);
            barrier.wait();
        }
    }
}

void autan_flash_tile(const FlashTile* tile, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
    flash_tile(*tile);
}

}
