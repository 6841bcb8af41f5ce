// A decode step as a list of operations. Every thread of the team runs every operation on its share of the work, and all
// meet behind each one. Operands are addresses and sizes in 64-bit words, written once when the model is loaded;
// what changes from step to step is in Batch.
#pragma once

#include "decode_attention.h"
#include "outer_product.h"
#include "row_ops.h"

enum Code : int64_t {
    EMBED = 1,
    NORM = 2,
    LINEAR = 3,
    ROPE_TABLES = 4,
    ROTATE_GQA = 5,
    ATTEND = 6,
    GATE = 7,
    SPLIT_LATENT = 8,
    ROTATE_MLA = 9,
    HEADS_LINEAR = 10,
    ROUTE = 11,
    EXPERTS = 12,
};

constexpr int OPERANDS = 20;

struct Op {
    int64_t code;
    int64_t v[OPERANDS - 1];

    template <class T>
    T* at(int i) const { return reinterpret_cast<T*>(v[i]); }
    float number(int i) const {
        double out;
        std::memcpy(&out, &v[i], 8);
        return (float)out;
    }
};

struct Batch {
    int64_t rows;
    const int64_t* token_ids;
    const int64_t* positions;
    const int64_t* slots;        // row of the pool that each row writes, in layer 0
    const int32_t* block_tables; // [rows][table_width]
    int64_t table_width;
    const int32_t* lengths;
    bf16* pool;
};

struct Team {
    int id, threads;
    Barrier* barrier;
};

void attend(const Op& op, const Batch& batch, const Team& team);
