// The gated RMSNorm behind the delta rule: y = x rsqrt(mean(x^2) + eps) w act(z), in fp32.
#pragma once

#include <algorithm>

#include "common.h"

namespace gdn {

// One head: o[0:values] in place, rounded to `dtype` first; o, z and w are zero past the V values.
GDN_INLINE void gated_norm_row(float* o, const float* z, const float* w, int64_t V, int64_t values, int64_t dtype,
                               float eps, bool gate_is_sigmoid) {
  vf total{};
  for (int64_t c = 0; c < values; c += LANES) {
    const vf y = rounded(load(o + c), dtype);
    total += y * y;
    store(o + c, y);
  }
  const float r = 1.0f / std::sqrt(sum(total) / float(V) + eps);
  for (int64_t c = 0; c < values; c += LANES) {
    const vf x = load(z + c);
    store(o + c, load(o + c) * r * load(w + c) * (gate_is_sigmoid ? sigmoid(x) : silu(x)));
  }
}

constexpr int64_t NORM_TOKENS = 16;  // a task

// Every row of x [tokens, heads, V] into out, which may be x.
inline void gated_norm(const GatedNormArguments& p) {
  const int64_t V = p.value_dim, values = round_up(V, LANES), dtype = p.x.dtype;
  for_each_task((p.tokens + NORM_TOKENS - 1) / NORM_TOKENS, [&](int64_t task) {
    Scratch& scratch = Scratch::of_this_thread(3 * Scratch::piece(values));
    float *o = scratch.take(values), *z = scratch.take(values), *w = scratch.take(values);
    load_row(w, p.weight.data, p.weight.dtype, V, values);
    for (int64_t t = task * NORM_TOKENS; t < std::min(p.tokens, (task + 1) * NORM_TOKENS); t++) {
      for (int64_t h = 0; h < p.heads; h++) {
        load_row(o, at(p.x.data, t * p.x.row + h * p.x.head, dtype), dtype, V, values);
        load_row(z, at(p.z.data, t * p.z.row + h * p.z.head, p.z.dtype), p.z.dtype, V, values);
        gated_norm_row(o, z, w, V, values, dtype, float(p.eps), p.gate_is_sigmoid);
        store_row(at(p.out.data, t * p.out.row + h * p.out.head, p.out.dtype), o, p.out.dtype, V);
      }
    }
  });
}

}  // namespace gdn
