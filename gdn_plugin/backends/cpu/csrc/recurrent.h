// The recurrence one token at a time, for decode and for speculative tokens.
//
// A block of LANES rows of the state (a row is one value channel, K long) is read once from memory. S k and S q are
// taken in one pass, and the new output follows from the old state:
//     delta = beta (v - e^g S k),   S <- e^g S + delta k^T,   S q <- e^g S q + delta (k.q)
// so that the second pass over the block, which is in the first-level cache by then, only updates it.
#pragma once

#include <algorithm>

#include "common.h"

namespace gdn {

struct Token {  // one token of one value head, fp32; k and q are padded with zeros to a multiple of LANES
  const float *k, *q, *v;
  float decay, beta, k_dot_q, scale;
  float* out;  // [V] padded to LANES
  int64_t key_dim;
};

inline float dot(const float* x, const float* y, int64_t n) {
  vf total{};
  for (int64_t i = 0; i < n; i += LANES) total += load(x + i) * load(y + i);
  return sum(total);
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int HELD = 8;  // vectors of k, and of q, that fit into registers beside the rest
#else
constexpr int HELD = 0;
#endif

// 16, 32 and 64 rows ahead took the same time within 4 % (67 MB of state, one core), 8 rows 9 % more, none 20 % more.
constexpr int64_t ROWS_AHEAD = 16;

// A vector of k or q: from registers where all NK of them are held there, else from memory.
template <int NK>
struct Operand {
  static constexpr bool in_registers = NK > 0 && NK <= HELD;
  const float* from;
  vf held[in_registers ? NK : 1];
  GDN_INLINE explicit Operand(const float* p) : from(p) {
    if constexpr (in_registers) {
#pragma GCC unroll 8
      for (int c = 0; c < NK; c++) held[c] = load(p + c * LANES);
    }
  }
  GDN_INLINE vf operator[](int64_t c) const { return in_registers ? held[c] : load(from + c * LANES); }
};

// The output from the new state itself, for a token that is not finite: worked out from the old one, what should be
// NaN (inf - inf, in S q) would come out as infinity. Padding of the key dim is brought back to zeros. (Finite numbers
// whose product overflows in the state alone are not looked for.)
template <int64_t DT>
[[gnu::noinline]] inline void output_again(void* rows, int64_t stride, int64_t vectors, const Token& token,
                                           int64_t value, int count) {
  alignas(64) float along_q[LANES] = {};
  for (int r = 0; r < count; r++) {
    vf t{};
    for (int64_t c = 0; c < vectors; c++) {
      void* const p = at(rows, r * stride + c * LANES, DT);
      const vf x = select(iota() + int32_t(c * LANES) < int32_t(token.key_dim), load_as<DT>(p), vf{});
      store_as<DT>(p, x);
      t += x * load(token.q + c * LANES);
    }
    along_q[r] = sum(t);
  }
  store(token.out + value, load(along_q) * token.scale);
}

// Rows value .. value + count of S, NK vectors each (0: any number, `vectors`), `stride` elements apart, in place.
template <int64_t DT, int NK>
GDN_INLINE void step_rows(void* rows, int64_t stride, int64_t vectors, const Token& token, int64_t value, int count) {
  const int64_t n = NK > 0 ? NK : vectors;
  const vf decay = splat(token.decay);
  const Operand<NK> k(token.k);
  vf along_k[LANES], along_q[LANES];
  {
    const Operand<NK> q(token.q);
    for (int r = 0; r < count; r++) {
      const void* const row = at(rows, r * stride, DT);
      vf s{}, t{};
#pragma GCC unroll 8
      for (int64_t c = 0; c < n; c++) {
        __builtin_prefetch(at(row, ROWS_AHEAD * stride + c * LANES, DT), 1);
        const vf x = load_as<DT>(at(row, c * LANES, DT));
        s += x * k[c];
        t += x * q[c];
      }
      along_k[r] = s;
      along_q[r] = t;
    }
  }
  for (int r = count; r < LANES; r++) along_k[r] = along_q[r] = vf{};
  const vf delta = (load(token.v + value) - sums(along_k) * decay) * token.beta;
  const vf out = (sums(along_q) * decay + delta * token.k_dot_q) * token.scale;
  store(token.out + value, out);
  alignas(64) float deltas[LANES];
  store(deltas, delta);
  for (int r = 0; r < count; r++) {
    void* const row = at(rows, r * stride, DT);
    const vf d = splat(deltas[r]);
#pragma GCC unroll 8
    for (int64_t c = 0; c < n; c++) {
      void* const p = at(row, c * LANES, DT);
      store_as<DT>(p, load_as<DT>(p) * decay + d * k[c]);
    }
  }
  const bool finite = sum((out - out) + (delta - delta)) == 0.0f;
  if (!finite) output_again<DT>(rows, stride, n, token, value, count);
}

template <int64_t DT, int NK>
GDN_INLINE void step_head(void* state, int64_t K, const Token& token, int64_t begin, int64_t end) {
  for (int64_t value = begin; value < end; value += LANES) {
    const int count = int(std::min<int64_t>(LANES, end - value));
    step_rows<DT, NK>(at(state, value * K, DT), K, K / LANES, token, value, count);
  }
}

template <int64_t DT>
inline void read_rows(float* to, int64_t padded, const void* from, int64_t K, int count) {
  for (int r = 0; r < count; r++) load_row_as<DT>(to + r * padded, at(from, r * K, DT), K, padded);
}

template <int64_t DT>
inline void write_rows(void* to, int64_t K, const float* from, int64_t padded, int count) {
  for (int r = 0; r < count; r++) store_row_as<DT>(at(to, r * K, DT), from + r * padded, K);
}

// Value channels begin..end of one head's state [V, K], in place; `spare` holds LANES padded rows.
template <int64_t DT>
inline void step_state(void* state, int64_t K, const Token& token, int64_t begin, int64_t end, float* spare) {
  if (K == 8 * LANES) return step_head<DT, 8>(state, K, token, begin, end);
  if (K == 16 * LANES) return step_head<DT, 16>(state, K, token, begin, end);
  if (K % LANES == 0) return step_head<DT, 0>(state, K, token, begin, end);
  const int64_t padded = round_up(K, LANES);
  for (int64_t value = begin; value < end; value += LANES) {
    const int count = int(std::min<int64_t>(LANES, end - value));
    void* const rows = at(state, value * K, DT);
    read_rows<DT>(spare, padded, rows, K, count);
    step_rows<F32, 0>(spare, padded, padded / LANES, token, value, count);
    write_rows<DT>(rows, K, spare, padded, count);
  }
}

inline void step_state(void* state, int64_t dtype, int64_t K, const Token& token, int64_t begin, int64_t end,
                       float* spare) {
  if (dtype == F32) return step_state<F32>(state, K, token, begin, end, spare);
  if (dtype == BF16) return step_state<BF16>(state, K, token, begin, end, spare);
  return step_state<F16>(state, K, token, begin, end, spare);
}

// How many parts the V dimension is cut into so that `heads` tasks become at least as many as there are threads.
inline int64_t parts_of_values(int64_t heads, int64_t value_dim) {
  const int64_t blocks = (value_dim + LANES - 1) / LANES, threads = gdn_threads();
  return std::max<int64_t>(1, std::min(blocks, (threads + heads - 1) / std::max<int64_t>(heads, 1)));
}

GDN_INLINE int64_t part_edge(int64_t value_dim, int64_t part, int64_t parts) {
  return std::min(value_dim, (value_dim + LANES - 1) / LANES * part / parts * LANES);
}

inline void decode(const DecodeArguments& p) {
  const int64_t Hk = p.size.key_heads, Hv = p.size.value_heads, K = p.size.key_dim, V = p.size.value_dim;
  const int64_t group = Hv / Hk, padded = round_up(K, LANES), values = round_up(V, LANES);
  // A key head with all its value heads is one task, which prepares k and q once; where that leaves few tasks a thread,
  // each value head is one, and where even they are too few, a part of its channels.
  const int64_t split = p.size.sequences * Hk < 4 * gdn_threads() ? group : 1;
  const int64_t parts = parts_of_values(p.size.sequences * Hk * split, V);
  for_each_task(p.size.sequences * Hk * split * parts, [&](int64_t task) {
    const int64_t part = task % parts, rest = task / parts, i = rest / (Hk * split);
    const int64_t first = rest % (Hk * split) * (group / split), last = first + group / split, key_head = first / group;
    const int64_t begin = part_edge(V, part, parts), end = part_edge(V, part + 1, parts);
    if (begin == end) return;
    const auto out_of = [&](int64_t h) { return at(p.out.data, i * p.out.row + h * p.out.head + begin, p.out.dtype); };
    const int64_t row = p.state_indices[i];
    if (is_padding(row, p.null_index)) {
      for (int64_t h = first; p.zero_padding && h < last; h++) zero_row(out_of(h), p.out.dtype, end - begin);
      return;
    }
    Scratch& scratch = Scratch::of_this_thread(2 * Scratch::piece(padded) + 2 * Scratch::piece(values) +
                                               LANES * Scratch::piece(padded) + 2 * Scratch::piece(group));
    float *k = scratch.take(padded), *q = scratch.take(padded), *v = scratch.take(values), *o = scratch.take(values);
    float *log_decay = scratch.take(group), *beta = scratch.take(group);
    float* const spare = scratch.take(LANES * padded);
    load_row(k, at(p.k.data, i * p.k.row + key_head * p.k.head, p.k.dtype), p.k.dtype, K, padded);
    load_row(q, at(p.q.data, i * p.q.row + key_head * p.q.head, p.q.dtype), p.q.dtype, K, padded);
    if (p.use_qk_l2norm) {
      l2_normalise(k, padded, p.k.dtype);
      l2_normalise(q, padded, p.q.dtype);
    }
    gates_of(p.gates, i, first, last - first, log_decay, beta);
    const float k_dot_q = dot(k, q, padded);
    for (int64_t h = first; h < last; h++) {
      load_row(v, at(p.v.data, i * p.v.row + h * p.v.head, p.v.dtype), p.v.dtype, V, values);
      const Token token{k, q, v, vexp(splat(log_decay[h - first]))[0], beta[h - first], k_dot_q, float(p.scale), o, K};
      step_state(at(p.state.data, row * p.state.row + h * V * K, p.state.dtype), p.state.dtype, K, token, begin, end,
                 spare);
      store_row(out_of(h), o + begin, p.out.dtype, end - begin);
    }
  });
}

// One block of value channels of one head through all tokens of a sequence; the state stays fp32 between them.
template <int64_t DT>
inline void verify_block(const VerifyArguments& p, int64_t sequence, int64_t origin, int64_t head, const Token* tokens,
                         int64_t length, int64_t value, int count, float* block) {
  const int64_t K = p.size.key_dim, padded = round_up(K, LANES);
  const int64_t offset = (head * p.size.value_dim + value) * K;
  read_rows<DT>(block, padded, at(p.state.data, origin * p.state.row + offset, DT), K, count);
  for (int64_t t = 0; t < length; t++) {
    if (padded == 8 * LANES) {
      step_rows<F32, 8>(block, padded, 8, tokens[t], value, count);
    } else {
      step_rows<F32, 0>(block, padded, padded / LANES, tokens[t], value, count);
    }
    const int64_t row = p.state_indices[sequence * p.state_indices_row + t];
    if (is_padding(row, p.null_index)) continue;
    write_rows<DT>(at(p.state.data, row * p.state.row + offset, DT), K, block, padded, count);
  }
}

inline int64_t origin_of(const VerifyArguments& p, int64_t i) {
  if (p.start_rows.data != nullptr) return p.start_rows[i];
  const int64_t accepted = std::max<int64_t>(p.num_accepted_tokens[i], 1);
  return p.state_indices[i * p.state_indices_row + accepted - 1];
}

inline void verify(const VerifyArguments& p) {
  const int64_t Hv = p.size.value_heads, K = p.size.key_dim, V = p.size.value_dim, group = Hv / p.size.key_heads;
  const int64_t padded = round_up(K, LANES), values = round_up(V, LANES), S = p.columns;
  const int64_t parts = parts_of_values(p.size.sequences * Hv, V);
  for_each_task(p.size.sequences * Hv * parts, [&](int64_t task) {
    const int64_t part = task % parts, h = task / parts % Hv, i = task / parts / Hv;
    const int64_t first = part_edge(V, part, parts), last = part_edge(V, part + 1, parts);
    const int64_t begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1], length = end - begin;
    if (first == last || length == 0) return;
    const int64_t origin = origin_of(p, i);
    if (is_padding(origin, p.null_index)) {
      for (int64_t t = begin; p.zero_padding && t < end; t++) {
        zero_row(at(p.out.data, t * p.out.row + h * p.out.head + first, p.out.dtype), p.out.dtype, last - first);
      }
      return;
    }
    constexpr int64_t TOKEN_FLOATS = sizeof(Token) / sizeof(float);
    Scratch& scratch = Scratch::of_this_thread(Scratch::piece(S * TOKEN_FLOATS) + Scratch::piece(LANES * padded) +
                                               S * (2 * Scratch::piece(padded) + 2 * Scratch::piece(values)));
    auto* const tokens = reinterpret_cast<Token*>(scratch.take(S * TOKEN_FLOATS));
    float* const block = scratch.take(LANES * padded);
    for (int64_t t = 0; t < length; t++) {
      float *k = scratch.take(padded), *q = scratch.take(padded), *v = scratch.take(values), *o = scratch.take(values);
      load_row(k, at(p.k.data, (begin + t) * p.k.row + h / group * p.k.head, p.k.dtype), p.k.dtype, K, padded);
      load_row(q, at(p.q.data, (begin + t) * p.q.row + h / group * p.q.head, p.q.dtype), p.q.dtype, K, padded);
      load_row(v, at(p.v.data, (begin + t) * p.v.row + h * p.v.head, p.v.dtype), p.v.dtype, V, values);
      if (p.use_qk_l2norm) {
        l2_normalise(k, padded, p.k.dtype);
        l2_normalise(q, padded, p.q.dtype);
      }
      float log_decay, beta;
      gates_of(p.gates, begin + t, h, 1, &log_decay, &beta);
      new (tokens + t) Token{k, q, v, vexp(splat(log_decay))[0], beta, dot(k, q, padded), float(p.scale), o, K};
    }
    for (int64_t value = first; value < last; value += LANES) {
      const int count = int(std::min<int64_t>(LANES, last - value));
      if (p.state.dtype == F32) {
        verify_block<F32>(p, i, origin, h, tokens, length, value, count, block);
      } else if (p.state.dtype == BF16) {
        verify_block<BF16>(p, i, origin, h, tokens, length, value, count, block);
      } else {
        verify_block<F16>(p, i, origin, h, tokens, length, value, count, block);
      }
    }
    for (int64_t t = 0; t < length; t++) {
      void* const out = at(p.out.data, (begin + t) * p.out.row + h * p.out.head + first, p.out.dtype);
      store_row(out, tokens[t].out + first, p.out.dtype, last - first);
    }
  });
}

}  // namespace gdn
