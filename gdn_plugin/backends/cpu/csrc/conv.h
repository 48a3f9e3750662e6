// The causal depthwise convolution with SiLU, its state in the pool, and the two ops that start with it.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "norm.h"
#include "recurrent.h"

namespace gdn {

constexpr int64_t TOKEN_BLOCK = 64;

template <typename Word>
GDN_INLINE void gather_words(Word* to, const Word* from, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i * stride];
}

template <typename Word>
GDN_INLINE void scatter_words(Word* to, const Word* from, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i * stride] = from[i];
}

// load_row and store_row for elements `stride` apart; `words` holds n floats.
inline void load_strided(float* to, const void* from, int64_t dtype, int64_t stride, int64_t n, int64_t padded,
                         float* words) {
  if (stride == 1) return load_row(to, from, dtype, n, padded);
  if (dtype == F32) {
    gather_words(words, static_cast<const float*>(from), stride, n);
  } else {
    gather_words(reinterpret_cast<uint16_t*>(words), static_cast<const uint16_t*>(from), stride, n);
  }
  load_row(to, words, dtype, n, padded);
}

inline void store_strided(void* to, const float* from, int64_t dtype, int64_t stride, int64_t n, float* words) {
  if (stride == 1) return store_row(to, from, dtype, n);
  store_row(words, from, dtype, n);
  if (dtype == F32) {
    scatter_words(static_cast<float*>(to), words, stride, n);
  } else {
    scatter_words(static_cast<uint16_t*>(to), reinterpret_cast<const uint16_t*>(words), stride, n);
  }
}

// A run of channels (one head) through the convolution.
class Channels {
 public:
  static int64_t floats(int64_t width, int64_t tokens, int64_t dim) {
    const int64_t padded = Scratch::piece(round_up(dim, LANES));
    return (width + 3 + (width - 1 + tokens) + tokens) * padded;
  }

  Channels(const Conv& conv, Scratch& scratch, int64_t tokens, int64_t max_dim)
      : conv_(conv), capacity_(round_up(max_dim, LANES)) {
    weight_ = scratch.take(conv.width * capacity_);
    bias_ = scratch.take(capacity_);
    words_ = scratch.take(capacity_);
    inputs_ = scratch.take((conv.width - 1 + tokens) * capacity_);
    spare_ = scratch.take(capacity_);
    results_ = scratch.take(tokens * capacity_);
  }

  // Channels first .. first + n from now on.
  void select(int64_t first, int64_t n) {
    first_ = first;
    n_ = n;
    padded_ = round_up(n, LANES);
    const Matrix& w = conv_.weight;
    if (conv_.width == 4 && w.column == 1 && w.row == 4 && n % LANES == 0) {
      const void* const from = at(w.data, first * 4, w.dtype);
      if (w.dtype == BF16) {
        split_taps<BF16>(from);
      } else if (w.dtype == F32) {
        split_taps<F32>(from);
      } else {
        split_taps<F16>(from);
      }
    } else {
      for (int64_t j = 0; j < conv_.width; j++) {
        const void* const from = at(w.data, first * w.row + j * w.column, w.dtype);
        load_strided(weight_ + j * padded_, from, w.dtype, w.row, n, padded_, words_);
      }
    }
    if (conv_.bias.data != nullptr) {
      const void* const from = at(conv_.bias.data, first * conv_.bias.stride, conv_.bias.dtype);
      load_strided(bias_, from, conv_.bias.dtype, conv_.bias.stride, n, padded_, words_);
    } else {
      std::memset(bias_, 0, size_t(padded_) * sizeof(float));
    }
  }

  // inputs()[i]: i < W - 1 is history, then the tokens.
  float* input(int64_t i) { return inputs_ + i * padded_; }

  void read_token(float* to, int64_t t) {
    const Matrix& x = conv_.input;
    load_strided(to, at(x.data, t * x.row + first_ * x.column, x.dtype), x.dtype, x.column, n_, padded_, words_);
  }
  void read_tokens(int64_t first_input, int64_t t, int64_t count) {
    for (int64_t i = 0; i < count; i++) read_token(input(first_input + i), t + i);
  }
  void no_history() { std::memset(inputs_, 0, size_t((conv_.width - 1) * padded_) * sizeof(float)); }
  void read_history(int64_t row, int64_t first_column) {
    for (int64_t j = 0; j < conv_.width - 1; j++) {
      load_strided(input(j), column(row, first_column + j), conv_.pool.dtype, conv_.pool.channel, n_, padded_, words_);
    }
  }
  void write_column(int64_t row, int64_t j, const float* values) {
    store_strided(column(row, j), values, conv_.pool.dtype, conv_.pool.channel, n_, words_);
  }

  // result(i) <- silu(bias + sum_j w_j x_{i - W + 1 + j}), rounded to the io dtype, for the tokens t .. t + count,
  // whose history is in input(0 .. W - 2).
  void convolve(int64_t t, int64_t count) {
    const Matrix& x = conv_.input;
    if (conv_.width == 4 && x.column == 1 && n_ % (2 * LANES) == 0) {
      const void* const from = at(x.data, t * x.row + first_, x.dtype);
      if (x.dtype == BF16) return convolve_four<BF16>(from, count);
      if (x.dtype == F32) return convolve_four<F32>(from, count);
      return convolve_four<F16>(from, count);
    }
    read_tokens(conv_.width - 1, t, count);
    for (int64_t i = 0; i < count; i++) {
      for (int64_t c = 0; c < padded_; c += LANES) {
        vf y = load(bias_ + c);
        for (int64_t j = 0; j < conv_.width; j++) y += load(weight_ + j * padded_ + c) * load(input(i + j) + c);
        store(result(i) + c, rounded(silu(y), x.dtype));
      }
    }
  }
  float* result(int64_t i) { return results_ + i * padded_; }

  float* spare() { return spare_; }
  int64_t padded() const { return padded_; }

 private:
  // [n, 4] to [4, n]
  template <int64_t DT>
  void split_taps(const void* from) {
    using all = std::make_integer_sequence<int, LANES>;
    for (int64_t c = 0; c < n_; c += LANES) {
      vf x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) x[i] = load_as<DT>(at(from, c * 4 + i * LANES, DT));
      store(weight_ + c, every_fourth<0>(x, all{}));
      store(weight_ + padded_ + c, every_fourth<1>(x, all{}));
      store(weight_ + 2 * padded_ + c, every_fourth<2>(x, all{}));
      store(weight_ + 3 * padded_ + c, every_fourth<3>(x, all{}));
    }
  }

  // Four taps, a cache line of channels at a time: weights and history stay in registers down the tokens.
  template <int64_t DT>
  void convolve_four(const void* from, int64_t count) {
    constexpr int64_t AHEAD = 8;  // rows are far apart: no hardware prefetcher follows
    const int64_t row = conv_.input.row;
    for (int64_t c = 0; c < n_; c += 2 * LANES) {
      vf w[4][2], x[4][2];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          w[j][i] = load(weight_ + j * padded_ + c + i * LANES);
          x[j][i] = j < 3 ? load(input(j) + c + i * LANES) : vf{};
        }
      }
      const vf bias[2] = {load(bias_ + c), load(bias_ + c + LANES)};
      for (int64_t t = 0; t < count; t++) {
        const void* const p = at(from, t * row + c, DT);
        __builtin_prefetch(at(p, AHEAD * row, DT));
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          x[3][i] = load_as<DT>(at(p, i * LANES, DT));
          const vf y = bias[i] + x[0][i] * w[0][i] + x[1][i] * w[1][i] + x[2][i] * w[2][i] + x[3][i] * w[3][i];
          store(result(t) + c + i * LANES, rounded(silu(y), DT));
          x[0][i] = x[1][i];
          x[1][i] = x[2][i];
          x[2][i] = x[3][i];
        }
      }
    }
  }
  void* column(int64_t row, int64_t j) const {
    const ConvPool& pool = conv_.pool;
    return at(pool.data, row * pool.row + first_ * pool.channel + j * pool.column, pool.dtype);
  }

  const Conv& conv_;
  const int64_t capacity_;
  int64_t first_ = 0, n_ = 0, padded_ = 0;
  float *weight_, *bias_, *words_, *inputs_, *spare_, *results_;
};

// One new token through the channels: shifts conv_state by one. Returns the rounded SiLU output.
inline const float* convolve_one(Channels& channels, const Conv& conv, int64_t token, int64_t row, int64_t first,
                                 int64_t n) {
  channels.select(first, n);
  channels.read_history(row, 0);
  channels.convolve(token, 1);
  channels.read_token(channels.input(conv.width - 1), token);
  for (int64_t j = 0; j < conv.width - 1; j++) channels.write_column(row, j, channels.input(j + 1));
  return channels.result(0);
}

inline void fused_decode(const FusedDecodeArguments& p) {
  const int64_t Hk = p.size.key_heads, Hv = p.size.value_heads, K = p.size.key_dim, V = p.size.value_dim,
                group = Hv / Hk;
  const int64_t padded = round_up(K, LANES), values = round_up(V, LANES), longest = std::max(K, V);
  const int64_t io = p.conv.input.dtype;
  for_each_task(p.size.sequences * Hk, [&](int64_t task) {
    const int64_t key_head = task % Hk, i = task / Hk, row = p.state_indices[i];
    const auto out_of = [&](int64_t h) { return at(p.out.data, i * p.out.row + h * p.out.head, p.out.dtype); };
    if (is_padding(row, p.null_index)) {
      for (int64_t h = key_head * group; p.zero_padding && h < (key_head + 1) * group; h++) {
        zero_row(out_of(h), p.out.dtype, V);
      }
      return;
    }
    Scratch& scratch = Scratch::of_this_thread(Channels::floats(p.conv.width, 1, longest) + 2 * Scratch::piece(padded) +
                                               3 * Scratch::piece(values) + Scratch::piece(LANES * padded) +
                                               2 * Scratch::piece(group));
    Channels channels(p.conv, scratch, 1, longest);
    float *k = scratch.take(padded), *q = scratch.take(padded), *o = scratch.take(values);
    float *z = scratch.take(values), *w = scratch.take(values), *spare = scratch.take(LANES * padded);
    float *log_decay = scratch.take(group), *beta = scratch.take(group);
    std::memcpy(q, convolve_one(channels, p.conv, i, row, key_head * K, K), size_t(padded) * sizeof(float));
    std::memcpy(k, convolve_one(channels, p.conv, i, row, (Hk + key_head) * K, K), size_t(padded) * sizeof(float));
    l2_normalise(q, padded, io);
    l2_normalise(k, padded, io);
    gates_of(p.gates, i, key_head * group, group, log_decay, beta);
    const float k_dot_q = dot(k, q, padded);
    const bool with_norm = p.norm_weight.data != nullptr;
    if (with_norm) load_strided(w, p.norm_weight.data, p.norm_weight.dtype, p.norm_weight.stride, V, values, z);
    for (int64_t j = 0; j < group; j++) {
      const int64_t h = key_head * group + j;
      const float* const v = convolve_one(channels, p.conv, i, row, 2 * Hk * K + h * V, V);
      const Token token{k, q, v, vexp(splat(log_decay[j]))[0], beta[j], k_dot_q, float(p.scale), o, K};
      step_state(at(p.state.data, row * p.state.row + h * V * K, p.state.dtype), p.state.dtype, K, token, 0, V, spare);
      if (with_norm) {
        load_row(z, at(p.z.data, i * p.z.row + h * p.z.head, p.z.dtype), p.z.dtype, V, values);
        gated_norm_row(o, z, w, V, values, io, float(p.norm_eps), p.gate_is_sigmoid);
      }
      store_row(out_of(h), o, p.out.dtype, V);
    }
  });
}

// Tokens begin .. begin + count of a sequence.
struct TokenBlock {
  int64_t sequence, begin, count;
};

inline void prologue_head(const PrologueArguments& p, Channels& channels, const TokenBlock& block, int64_t first,
                          int64_t n, const Rows& result, int64_t head, bool with_norm) {
  const int64_t W = p.conv.width, i = block.sequence, start = p.cu_seqlens[i], end = p.cu_seqlens[i + 1];
  const int64_t row = p.state_indices[i];
  const bool is_first = block.begin == start;
  const bool fresh = !p.has_initial_state[i];
  const bool speculative = p.num_accepted_tokens.data != nullptr;
  channels.select(first, n);
  if (!is_first) {
    channels.read_tokens(0, block.begin - (W - 1), W - 1);
  } else if (fresh) {
    channels.no_history();
  } else {
    channels.read_history(row, speculative ? std::max<int64_t>(p.num_accepted_tokens[i], 1) - 1 : 0);
  }
  if (is_first) {
    // Input j of the sequence with its history in front goes to column j - offset.
    const int64_t length = end - start, offset = speculative ? 1 : length;
    for (int64_t j = offset; j < W - 1 + length; j++) {
      const float* values = channels.input(j);
      if (j >= W - 1) {
        channels.read_token(channels.spare(), start + j - (W - 1));
        values = channels.spare();
      }
      channels.write_column(row, j - offset, values);
    }
  }
  channels.convolve(block.begin, block.count);
  for (int64_t t = 0; t < block.count; t++) {
    float* const y = channels.result(t);
    if (with_norm) l2_normalise(y, channels.padded(), result.dtype);
    store_row(at(result.data, (block.begin + t) * result.row + head * result.head, result.dtype), y, result.dtype, n);
  }
}

inline void prologue_gates(const PrologueArguments& p, int64_t begin, int64_t count, float* log_decay,
                           float* strength) {
  const int64_t Hv = p.size.value_heads;
  auto* const g = static_cast<float*>(p.g.data);
  auto* const beta = static_cast<float*>(p.beta.data);
  for (int64_t t = begin; t < begin + count; t++) {
    gates_of(p.gates, t, 0, Hv, log_decay, strength);
    if (p.exp_gate) {
      for (int64_t h = 0; h < Hv; h += LANES) store(log_decay + h, vexp(load(log_decay + h)));
    }
    for (int64_t h = 0; h < Hv; h++) {
      g[t * p.g.row + h * p.g.column] = log_decay[h];
      beta[t * p.beta.row + h * p.beta.column] = strength[h];
    }
  }
}

// Tokens begin .. end belong to padding.
inline void prologue_padding(const PrologueArguments& p, int64_t begin, int64_t end) {
  const Rows* const results[] = {&p.q, &p.k, &p.v};
  for (int64_t t = begin; t < end; t++) {
    for (const Rows* x : results) {
      const bool values = x == &p.v;
      for (int64_t h = 0; h < (values ? p.size.value_heads : p.size.key_heads); h++) {
        zero_row(at(x->data, t * x->row + h * x->head, x->dtype), x->dtype, values ? p.size.value_dim : p.size.key_dim);
      }
    }
    for (int64_t h = 0; h < p.size.value_heads; h++) {
      static_cast<float*>(p.g.data)[t * p.g.row + h * p.g.column] = p.exp_gate ? 1.0f : 0.0f;
      static_cast<float*>(p.beta.data)[t * p.beta.row + h * p.beta.column] = 0.0f;
    }
  }
}

inline void conv_prologue(const PrologueArguments& p) {
  const int64_t Hk = p.size.key_heads, Hv = p.size.value_heads, K = p.size.key_dim, V = p.size.value_dim;
  const int64_t heads = 2 * Hk + Hv, longest = std::max(K, V), gates = round_up(Hv, LANES);
  prologue_padding(p, p.cu_seqlens[p.size.sequences], p.size.tokens);
  std::vector<TokenBlock> blocks;
  for (int64_t i = 0; i < p.size.sequences; i++) {
    const int64_t begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1];
    if (is_padding(p.state_indices[i], p.null_index)) {
      prologue_padding(p, begin, end);
      continue;
    }
    for (int64_t t = begin; t < end; t += TOKEN_BLOCK) {
      blocks.push_back({i, t, std::min(TOKEN_BLOCK, end - t)});
    }
  }
  if (blocks.empty()) return;
  // Few blocks are split by heads, to four tasks a thread.
  const int64_t count = int64_t(blocks.size()), parts = std::min(heads, (4 * gdn_threads() + count - 1) / count);
  for_each_task(count * parts, [&](int64_t task) {
    const TokenBlock& block = blocks[size_t(task / parts)];
    const int64_t part = task % parts, i = block.sequence;
    Scratch& scratch =
        Scratch::of_this_thread(Channels::floats(p.conv.width, TOKEN_BLOCK, longest) + 2 * Scratch::piece(gates));
    Channels channels(p.conv, scratch, TOKEN_BLOCK, longest);
    float *log_decay = scratch.take(gates), *strength = scratch.take(gates);
    for (int64_t h = heads * part / parts; h < heads * (part + 1) / parts; h++) {
      if (h < Hk) {
        prologue_head(p, channels, block, h * K, K, p.q, h, true);
      } else if (h < 2 * Hk) {
        prologue_head(p, channels, block, h * K, K, p.k, h - Hk, true);
      } else {
        prologue_head(p, channels, block, 2 * Hk * K + (h - 2 * Hk) * V, V, p.v, h - 2 * Hk, false);
      }
    }
    if (part == 0) prologue_gates(p, block.begin, block.count, log_decay, strength);
    const bool fresh = !p.has_initial_state[i];
    if (p.state.data != nullptr && fresh && block.begin == p.cu_seqlens[i]) {
      const int64_t row = p.state_indices[i], size = Hv * V * K, first = size * part / parts;
      zero_row(at(p.state.data, row * p.state.row + first, p.state.dtype), p.state.dtype,
               size * (part + 1) / parts - first);
    }
  });
}

}  // namespace gdn
