// The ops as PyTorch's dispatcher calls them: tensors, in the order of the ops' records (gdn_plugin/ops/record.py), hints
// left out, put into the structs of arguments.h. Schemas are made from the records when the library is
// loaded, and a function here that does not fit its schema is refused then.
//
// Shapes, dtypes and layouts have been checked by the public ops. What could make a kernel read or write outside of a
// tensor is checked again; index values are checked by the kernels.
#include <torch/library.h>

#include "arguments.h"

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using namespace gdn;

int64_t code(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return F32;
    case at::kBFloat16:
      return BF16;
    case at::kHalf:
      return F16;
    default:
      TORCH_CHECK_VALUE(false, name, ": expected float32, bfloat16 or float16, got ", x.dtype());
  }
}

void* data(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }
void* written(const Tensor& x) { return x.mutable_data_ptr(); }

Rows rows(const char* name, const Tensor& x, void* (*pointer)(const Tensor&) = data) {
  TORCH_CHECK_VALUE(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) == 1), name,
                    ": expected a last dim of stride 1, got strides ", x.strides());
  return {pointer(x), code(name, x), x.stride(0), x.stride(1)};
}

Matrix matrix(const char* name, const Tensor& x, void* (*pointer)(const Tensor&) = data) {
  return {pointer(x), code(name, x), x.stride(0), x.stride(1)};
}

Vector vector(const char* name, const Tensor& x) { return {data(x), code(name, x), x.stride(0)}; }
Vector vector(const char* name, const Optional& x) { return x ? vector(name, *x) : Vector{}; }

Integers integers(const char* name, const Tensor& x) {
  const bool wide = x.scalar_type() == at::kLong;
  TORCH_CHECK_VALUE(wide || x.scalar_type() == at::kInt, name, ": expected int32 or int64, got ", x.dtype());
  return {data(x), x.stride(-1), wide};
}
// [B, S]: a row's values are neighbours (one value may have any stride), so a kernel counts them from the row's begin.
Integers neighbours(const char* name, const Tensor& x) {
  Integers found = integers(name, x);
  found.stride = 1;
  return found;
}
Integers integers(const char* name, const Optional& x) { return x ? integers(name, *x) : Integers{}; }

Flags flags(const char* name, const Optional& x) {
  if (!x) return {};
  TORCH_CHECK_VALUE(x->scalar_type() == at::kBool, name, ": expected bool, got ", x->dtype());
  return {static_cast<const uint8_t*>(data(*x)), x->stride(0)};
}

Pool pool(const char* name, const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  const auto dense = [&](int dim, int64_t wanted) { return size[dim] == 1 || stride[dim] == wanted; };
  TORCH_CHECK_VALUE(size.size() == 4 && dense(3, 1) && dense(2, size[3]) && dense(1, size[2] * size[3]), name,
                    ": expected rows that are dense inside, got strides ", stride, " for ", size);
  return {written(x), code(name, x), stride[0], size[0]};
}
Pool pool(const char* name, const Optional& x) { return x ? pool(name, *x) : Pool{}; }

Conv conv(const Tensor& input, const Tensor& weight, const Optional& bias, const Tensor& state) {
  return {matrix("mixed_qkv", input),
          matrix("conv_weight", weight),
          vector("conv_bias", bias),
          {written(state), code("conv_state", state), state.stride(0), state.stride(1), state.stride(2), state.size(0),
           state.size(2)},
          weight.size(1)};
}

Gates gates(const Tensor& a, const Tensor& b, const Tensor& a_log, const Tensor& dt_bias) {
  return {matrix("a", a), matrix("b", b), vector("A_log", a_log), vector("dt_bias", dt_bias)};
}

Sizes sizes(const Tensor& q, const Tensor& v, int64_t sequences) {
  return {q.size(0), sequences, q.size(1), v.size(1), q.size(2), v.size(2)};
}

void raise(const char* op, int32_t refusal) {
  static const char* const sentences[] = {
      "",
      "cu_seqlens: expected offsets that start at 0 or later, do not decrease and stay within the tokens, the columns"
      " of state_indices and those of conv_state",
      "state_indices (verify: or start_rows): expected rows of the pool",
      "num_accepted_tokens: expected no more than the columns of state_indices or conv_state allow",
      "checkpoint_cu_starts: expected rows of checkpoints"};
  TORCH_CHECK_VALUE(refusal == GDN_OK, "gdn.", op, ": ", sentences[refusal]);
}

void conv_prologue(const Tensor& mixed_qkv, const Tensor& conv_weight, const Optional& conv_bias,
                   const Tensor& conv_state, const Tensor& state_indices, const Tensor& cu_seqlens,
                   const Optional& has_initial_state, const Tensor& a, const Tensor& b, const Tensor& A_log,
                   const Tensor& dt_bias, int64_t num_k_heads, int64_t head_k_dim, int64_t head_v_dim,
                   const Optional& state, bool exp_gate, const Optional& num_accepted_tokens, int64_t null_index,
                   const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta) {
  const PrologueArguments p{
      {mixed_qkv.size(0), cu_seqlens.size(0) - 1, num_k_heads, v.size(1), head_k_dim, head_v_dim},
      conv(mixed_qkv, conv_weight, conv_bias, conv_state),
      integers("state_indices", state_indices),
      integers("cu_seqlens", cu_seqlens),
      flags("has_initial_state", has_initial_state),
      integers("num_accepted_tokens", num_accepted_tokens),
      gates(a, b, A_log, dt_bias),
      pool("state", state),
      exp_gate,
      null_index,
      rows("q", q, written),
      rows("k", k, written),
      rows("v", v, written),
      matrix("g", g, written),
      matrix("beta", beta, written)};
  raise("conv_prologue", gdn_conv_prologue(&p));
}

void prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
             const Tensor& state, const Tensor& state_indices, const Tensor& cu_seqlens,
             const Optional& has_initial_state, double scale, bool use_qk_l2norm, bool exp_gate, int64_t null_index,
             const Optional& checkpoints, const Optional& checkpoint_cu_starts, int64_t checkpoint_every,
             bool zero_padding, const Tensor& out) {
  const PrefillArguments p{sizes(q, v, cu_seqlens.size(0) - 1),
                           rows("q", q),
                           rows("k", k),
                           rows("v", v),
                           matrix("g", g),
                           matrix("beta", beta),
                           pool("state", state),
                           integers("state_indices", state_indices),
                           integers("cu_seqlens", cu_seqlens),
                           flags("has_initial_state", has_initial_state),
                           scale,
                           use_qk_l2norm,
                           exp_gate,
                           null_index,
                           rows("out", out, written),
                           pool("checkpoints", checkpoints),
                           integers("checkpoint_cu_starts", checkpoint_cu_starts),
                           checkpoint_every,
                           zero_padding};
  raise("prefill", gdn_prefill(&p));
}

void decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, const Tensor& A_log,
            const Tensor& dt_bias, const Tensor& state, const Tensor& state_indices, double scale, bool use_qk_l2norm,
            int64_t null_index, bool zero_padding, const Tensor& out) {
  const DecodeArguments p{sizes(q, v, q.size(0)),
                          rows("q", q),
                          rows("k", k),
                          rows("v", v),
                          gates(a, b, A_log, dt_bias),
                          pool("state", state),
                          integers("state_indices", state_indices),
                          scale,
                          use_qk_l2norm,
                          null_index,
                          rows("out", out, written),
                          zero_padding};
  raise("decode", gdn_decode(&p));
}

void fused_decode(const Tensor& mixed_qkv, const Tensor& conv_weight, const Optional& conv_bias,
                  const Tensor& conv_state, const Tensor& a, const Tensor& b, const Tensor& A_log,
                  const Tensor& dt_bias, const Tensor& state, const Tensor& state_indices, int64_t num_k_heads,
                  int64_t head_k_dim, int64_t head_v_dim, double scale, const Optional& z, const Optional& norm_weight,
                  double norm_eps, std::string_view gate, int64_t null_index, bool zero_padding, const Tensor& out) {
  const int64_t sequences = mixed_qkv.size(0);
  const bool with_norm = z && norm_weight;
  const FusedDecodeArguments p{{sequences, sequences, num_k_heads, a.size(1), head_k_dim, head_v_dim},
                               conv(mixed_qkv, conv_weight, conv_bias, conv_state),
                               gates(a, b, A_log, dt_bias),
                               pool("state", state),
                               integers("state_indices", state_indices),
                               scale,
                               with_norm ? rows("z", *z) : Rows{},
                               with_norm ? vector("norm_weight", *norm_weight) : Vector{},
                               norm_eps,
                               gate == "sigmoid",
                               null_index,
                               rows("out", out, written),
                               zero_padding};
  raise("fused_decode", gdn_fused_decode(&p));
}

void verify(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, const Tensor& A_log,
            const Tensor& dt_bias, const Tensor& state, const Tensor& state_indices, const Tensor& num_accepted_tokens,
            const Tensor& cu_seqlens, const Optional& start_rows, double scale, bool use_qk_l2norm, int64_t null_index,
            bool zero_padding, const Tensor& out) {
  const VerifyArguments p{sizes(q, v, state_indices.size(0)),
                          rows("q", q),
                          rows("k", k),
                          rows("v", v),
                          gates(a, b, A_log, dt_bias),
                          pool("state", state),
                          neighbours("state_indices", state_indices),
                          state_indices.stride(0),
                          state_indices.size(1),
                          integers("num_accepted_tokens", num_accepted_tokens),
                          integers("cu_seqlens", cu_seqlens),
                          integers("start_rows", start_rows),
                          scale,
                          use_qk_l2norm,
                          null_index,
                          rows("out", out, written),
                          zero_padding};
  raise("verify", gdn_verify(&p));
}

void gated_norm(const Tensor& x, const Tensor& z, const Tensor& weight, double eps, std::string_view gate,
                const Tensor& out) {
  const GatedNormArguments p{x.size(0),
                             x.size(1),
                             x.size(2),
                             rows("x", x),
                             rows("z", z),
                             vector("weight", weight),
                             eps,
                             gate == "sigmoid",
                             rows("out", out, written)};
  raise("gated_norm", gdn_gated_norm(&p));
}

// GDN_NAMESPACE names the instruction-set level, so that several may be loaded in one process.
#define GDN_REGISTER(name)                     \
  TORCH_LIBRARY_IMPL(name, CPU, library) {     \
    library.impl("conv_prologue", &conv_prologue); \
    library.impl("prefill", &prefill);         \
    library.impl("decode", &decode);           \
    library.impl("fused_decode", &fused_decode); \
    library.impl("verify", &verify);           \
    library.impl("gated_norm", &gated_norm);   \
  }
GDN_REGISTER(GDN_NAMESPACE)

}  // namespace
