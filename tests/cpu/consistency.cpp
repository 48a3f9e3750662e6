// The kernels without Python and torch, against loops in double precision: for CPUs that only an emulator runs here.
// Prints the worst error of each op, relative to the root mean square of the right result; exits 1 where one is too
// large.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "arguments.h"
#include "matmul.h"

extern "C" int64_t gdn_threads() { return 1; }
extern "C" void gdn_on_workers(int64_t tasks, void (*fn)(void*, int64_t), void* context) {
  if (tasks > 0) fn(context, 0);
}

using namespace gdn;
using Doubles = std::vector<double>;

static std::mt19937 generator(7);
static double normal() { return std::normal_distribution<double>()(generator); }

// Values of a dtype: what a kernel sees, and the same numbers as doubles.
struct Values {
  int64_t dtype;
  std::vector<float> words;  // storage for any dtype
  size_t count;
  Values(int64_t dtype_, size_t n, double scale = 1.0) : dtype(dtype_), words(n + LANES), count(n) {
    for (size_t i = 0; i < n; i++) set(i, float(normal() * scale));
  }
  void set(size_t i, float x) {
    if (dtype == F32) {
      words[i] = x;
    } else {
      const vh h = dtype == BF16 ? to_bf16(splat(x)) : to_f16(splat(x));
      reinterpret_cast<uint16_t*>(words.data())[i] = h[0];
    }
  }
  double operator[](size_t i) const { return scalar_from(words.data(), int64_t(i), dtype); }
  void* data() { return words.data(); }
};

static double worst(const Values& got, const Doubles& want) {
  double error = 0, square = 0;
  for (size_t i = 0; i < want.size(); i++) {
    error = std::max(error, std::isfinite(got[i]) ? std::fabs(got[i] - want[i]) : INFINITY);
    square += want[i] * want[i];
  }
  return error / std::sqrt(square / double(want.size()));
}

static bool failed = false;
static void report(const char* what, int64_t dtype, double error, double bound) {
  std::printf("%-14s %s  error %.2e  bound %.0e%s\n", what,
              dtype == F32    ? "fp32"
              : dtype == BF16 ? "bf16"
                              : "fp16",
              error, bound, error <= bound ? "" : "  TOO LARGE");
  failed = failed || !(error <= bound);
}

constexpr int64_t Hk = 1, Hv = 2, K = 36, V = 20, T = 75;  // K and V fill no vector

static void step(double* S, const Values& q, const Values& k, const Values& v, int64_t t, int64_t h, double g,
                 double beta, double scale, double* out) {
  for (int64_t i = 0; i < V; i++) {
    double along_k = 0, along_q = 0;
    for (int64_t j = 0; j < K; j++) along_k += (S[i * K + j] *= std::exp(g)) * k[size_t(t * K + j)];
    const double delta = beta * (v[size_t((t * Hv + h) * V + i)] - along_k);
    for (int64_t j = 0; j < K; j++) along_q += (S[i * K + j] += delta * k[size_t(t * K + j)]) * q[size_t(t * K + j)];
    out[i] = scale * along_q;
  }
}

static void check(int64_t dtype) {
  const double loose = dtype == F32 ? 2e-5 : 4e-2;
  Values q(dtype, T * K, 0.17), k(dtype, T * K, 0.17), v(dtype, T * Hv * V), out(dtype, T * Hv * V);
  Values a(dtype, T * Hv), b(dtype, T * Hv), a_log(F32, Hv, 0.3), dt_bias(dtype, Hv), g(F32, T * Hv), beta(F32, T * Hv);
  Values start(F32, Hv * V * K, 0.2), state = start;
  for (size_t i = 0; i < T * Hv; i++) {
    const double x = a[i] + dt_bias[i % Hv];
    g.set(i, float(-std::exp(a_log[i % Hv]) * (x > 20 ? x : std::log1p(std::exp(x)))));
    beta.set(i, float(1 / (1 + std::exp(-b[i]))));
  }
  Doubles S(Hv * V * K), want(T * Hv * V);
  for (size_t i = 0; i < S.size(); i++) S[i] = start[i];
  for (int64_t t = 0; t < T; t++) {
    for (int64_t h = 0; h < Hv; h++) {
      const size_t at_gate = size_t(t * Hv + h);
      step(&S[size_t(h * V * K)], q, k, v, t, h, g[at_gate], beta[at_gate], 0.2, &want[at_gate * V]);
    }
  }
  const int32_t row = 0, one = 1, offsets[] = {0, T}, single[] = {0, 1};
  const Sizes size{T, 1, Hk, Hv, K, V};
  const Rows q_rows{q.data(), dtype, K, K}, k_rows{k.data(), dtype, K, K}, v_rows{v.data(), dtype, Hv * V, V};
  const Rows out_rows{out.data(), dtype, Hv * V, V};
  const Pool pool{state.data(), F32, Hv * V * K, 1};
  const Gates gates{
      {a.data(), dtype, Hv, 1}, {b.data(), dtype, Hv, 1}, {a_log.data(), F32, 1}, {dt_bias.data(), dtype, 1}};
  const Integers rows{&row, 1, 0}, cu{offsets, 1, 0}, accepted{&one, 1, 0};

  PrefillArguments prefill{};
  prefill.size = size;
  prefill.q = q_rows, prefill.k = k_rows, prefill.v = v_rows, prefill.out = out_rows, prefill.state = pool;
  prefill.g = {g.data(), F32, Hv, 1}, prefill.beta = {beta.data(), F32, Hv, 1};
  prefill.state_indices = rows, prefill.cu_seqlens = cu, prefill.scale = 0.2, prefill.null_index = -1;
  if (gdn_prefill(&prefill) != 0) failed = true;
  report("prefill out", dtype, worst(out, want), loose);
  report("prefill state", dtype, worst(state, S), HAS_DOT && dtype == BF16 ? 4e-2 : 1e-4);

  // The same tokens one by one, and again as speculative ones.
  state = start;
  for (int64_t t = 0; t < T; t++) {
    DecodeArguments decode{};
    const auto shifted = [&](Rows x, int64_t stride) { return x.data = at(x.data, t * stride, dtype), x; };
    decode.size = {1, 1, Hk, Hv, K, V};
    decode.q = shifted(q_rows, K), decode.k = shifted(k_rows, K), decode.v = shifted(v_rows, Hv * V);
    decode.out = shifted(out_rows, Hv * V), decode.gates = gates;
    decode.gates.a.data = at(a.data(), t * Hv, dtype), decode.gates.b.data = at(b.data(), t * Hv, dtype);
    decode.state = pool, decode.state_indices = rows, decode.scale = 0.2, decode.null_index = -1;
    if (gdn_decode(&decode) != 0) failed = true;
  }
  report("decode out", dtype, worst(out, want), loose);
  report("decode state", dtype, worst(state, S), 1e-4);
  state = start;
  const std::vector<int32_t> same_row(T, 0);
  VerifyArguments verify{};
  verify.size = size, verify.q = q_rows, verify.k = k_rows, verify.v = v_rows, verify.out = out_rows;
  verify.gates = gates, verify.state = pool, verify.state_indices = {same_row.data(), 1, 0};
  verify.state_indices_row = T, verify.columns = T, verify.num_accepted_tokens = accepted, verify.cu_seqlens = cu;
  verify.scale = 0.2, verify.null_index = -1;
  if (gdn_verify(&verify) != 0) failed = true;
  report("verify out", dtype, worst(out, want), loose);
  report("verify state", dtype, worst(state, S), 1e-4);

  // The first token through the fused step, and through prologue and decode.
  constexpr int64_t dim = 2 * Hk * K + Hv * V, W = 4;
  Values mixed(dtype, T * dim), weight(dtype, dim * W, 0.5), bias(dtype, dim), history(dtype, dim * (W - 1));
  Values conv_state = history, conv_state_2 = history, fused(dtype, Hv * V), q1(dtype, K), k1(dtype, K),
         v1(dtype, Hv * V);
  const auto conv_of = [&](Values& states) {
    return Conv{{mixed.data(), dtype, dim, 1},
                {weight.data(), dtype, W, 1},
                {bias.data(), dtype, 1},
                {states.data(), dtype, dim * (W - 1), W - 1, 1, 1, W - 1},
                W};
  };
  state = start;
  FusedDecodeArguments step_arguments{};
  step_arguments.size = {1, 1, Hk, Hv, K, V}, step_arguments.conv = conv_of(conv_state), step_arguments.gates = gates;
  step_arguments.state = pool, step_arguments.state_indices = rows, step_arguments.scale = 0.2;
  step_arguments.null_index = -1, step_arguments.out = {fused.data(), dtype, Hv * V, V};
  if (gdn_fused_decode(&step_arguments) != 0) failed = true;
  PrologueArguments prologue{};
  prologue.size = {1, 1, Hk, Hv, K, V}, prologue.conv = conv_of(conv_state_2), prologue.state_indices = rows;
  prologue.cu_seqlens = {single, 1, 0}, prologue.gates = gates, prologue.null_index = -1;
  prologue.q = {q1.data(), dtype, K, K}, prologue.k = {k1.data(), dtype, K, K},
  prologue.v = {v1.data(), dtype, Hv * V, V};
  prologue.g = {g.data(), F32, Hv, 1}, prologue.beta = {beta.data(), F32, Hv, 1};
  if (gdn_conv_prologue(&prologue) != 0) failed = true;
  Doubles conv(Hv * V), fused_want(Hv * V);
  for (int64_t c = 0; c < Hv * V; c++) {
    const size_t channel = size_t(2 * Hk * K + c);
    double y = bias[channel] + weight[channel * W + W - 1] * mixed[channel];
    for (size_t j = 0; j < W - 1; j++) y += weight[channel * W + j] * history[channel * (W - 1) + j];
    conv[size_t(c)] = y / (1 + std::exp(-y));
  }
  report("conv v", dtype, worst(v1, conv), loose);
  for (int64_t h = 0; h < Hv; h++) {
    Doubles S1(size_t(V * K));
    for (size_t i = 0; i < S1.size(); i++) S1[i] = start[size_t(h * V * K) + i];
    step(S1.data(), q1, k1, v1, 0, h, g[size_t(h)], beta[size_t(h)], 0.2, &fused_want[size_t(h * V)]);
  }
  report("fused out", dtype, worst(fused, fused_want), loose);
  double moved = 0;
  for (size_t i = 0; i < dim * (W - 1); i++) moved += std::fabs(conv_state[i] - conv_state_2[i]);
  for (size_t c = 0; c < dim; c++) moved += std::fabs(conv_state[c * (W - 1) + W - 2] - mixed[c]);
  report("conv state", dtype, moved, 0);
}

int main() {
  for (const int64_t dtype : {F32, BF16, F16}) check(dtype);
  std::puts(failed ? "FAILED" : "OK");
  return failed ? 1 : 0;
}
