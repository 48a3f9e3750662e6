// What the kernels take: plain structs, filled from tensors by bindings.cpp, so that no kernel sees a header of torch.
// Strides are in elements. A null pointer is an absent tensor.
#pragma once

#include <cstdint>

namespace gdn {

enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

struct Integers {  // int32 or int64 values
  const void* data;
  int64_t stride, is_64;
  int64_t operator[](int64_t i) const {
    return is_64 ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
};

struct Flags {  // [n] bool; absent, all of them are true
  const uint8_t* data;
  int64_t stride;
  bool operator[](int64_t i) const { return data == nullptr || data[i * stride] != 0; }
};

struct Vector {  // [n]
  void* data;
  int64_t dtype, stride;
};

struct Matrix {  // [rows, columns]
  void* data;
  int64_t dtype, row, column;
};

struct Rows {  // [rows, heads, dim] with a dense last dim
  void* data;
  int64_t dtype, row, head;
};

struct Pool {  // [N, ...] with a dense inside
  void* data;
  int64_t dtype, row, rows;
};

struct ConvPool {  // [N, dim, columns]
  void* data;
  int64_t dtype, row, channel, column, rows, columns;
};

struct Sizes {
  int64_t tokens, sequences, key_heads, value_heads, key_dim, value_dim;
};

struct Gates {
  Matrix a, b;
  Vector a_log, dt_bias;
};

struct Conv {
  Matrix input, weight;
  Vector bias;
  ConvPool pool;
  int64_t width;
};

struct PrefillArguments {
  Sizes size;
  Rows q, k, v;
  Matrix g, beta;
  Pool state;
  Integers state_indices, cu_seqlens;
  Flags has_initial_state;
  double scale;
  int64_t use_qk_l2norm, exp_gate, null_index;
  Rows out;
  Pool checkpoints;
  Integers checkpoint_cu_starts;
  int64_t checkpoint_every, zero_padding;
};

struct DecodeArguments {
  Sizes size;
  Rows q, k, v;
  Gates gates;
  Pool state;
  Integers state_indices;
  double scale;
  int64_t use_qk_l2norm, null_index;
  Rows out;
  int64_t zero_padding;
};

struct VerifyArguments {
  Sizes size;
  Rows q, k, v;
  Gates gates;
  Pool state;
  Integers state_indices;  // [B, S], rows of neighbours
  int64_t state_indices_row, columns;
  Integers num_accepted_tokens, cu_seqlens, start_rows;
  double scale;
  int64_t use_qk_l2norm, null_index;
  Rows out;
  int64_t zero_padding;
};

struct FusedDecodeArguments {
  Sizes size;
  Conv conv;
  Gates gates;
  Pool state;
  Integers state_indices;
  double scale;
  Rows z;
  Vector norm_weight;
  double norm_eps;
  int64_t gate_is_sigmoid, null_index;
  Rows out;
  int64_t zero_padding;
};

struct GatedNormArguments {
  int64_t tokens, heads, value_dim;
  Rows x, z;
  Vector weight;
  double eps;
  int64_t gate_is_sigmoid;
  Rows out;
};

struct PrologueArguments {
  Sizes size;
  Conv conv;
  Integers state_indices, cu_seqlens;
  Flags has_initial_state;
  Integers num_accepted_tokens;
  Gates gates;
  Pool state;
  int64_t exp_gate, null_index;
  Rows q, k, v;
  Matrix g, beta;
};

}  // namespace gdn

// Every entry point returns 0, or the number of the argument that holds an impossible value (Refusal), before anything
// is written.
enum GdnRefusal : int32_t {
  GDN_OK = 0,
  GDN_BAD_CU_SEQLENS = 1,
  GDN_BAD_STATE_INDICES = 2,
  GDN_BAD_ACCEPTED = 3,
  GDN_BAD_CHECKPOINTS = 4
};

extern "C" {
// fn(context, worker) once on each of at most `tasks` threads of torch's pool; returns when all are done.
int64_t gdn_threads();  // how many threads that is at most
void gdn_on_workers(int64_t tasks, void (*fn)(void*, int64_t), void* context);

int32_t gdn_prefill(const gdn::PrefillArguments*);
int32_t gdn_decode(const gdn::DecodeArguments*);
int32_t gdn_verify(const gdn::VerifyArguments*);
int32_t gdn_fused_decode(const gdn::FusedDecodeArguments*);
int32_t gdn_conv_prologue(const gdn::PrologueArguments*);
int32_t gdn_gated_norm(const gdn::GatedNormArguments*);
}
