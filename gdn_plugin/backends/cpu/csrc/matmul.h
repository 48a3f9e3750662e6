// The inner loop of every matrix product: a block of MR x NR vectors kept in registers.
//
// With bf16 dot products (DOT) an element of A and a lane of B are pairs of bf16, neighbours along the reduction; both
// travel as 32-bit floats. Without, they are fp32 numbers.
#pragma once

#include "vec.h"

namespace gdn {

#if defined(__AVX512BF16__)
constexpr bool HAS_DOT = true;
#else
constexpr bool HAS_DOT = false;
#endif

template <bool DOT>
GDN_INLINE vf multiply_add(vf c, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (DOT) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#endif
  return a * b + c;
}

// c[m][n] += sum over r < R of a[m * am + r * ar] * b[r * br + n * LANES : + LANES]
template <int MR, int NR, bool DOT>
GDN_INLINE void accumulate(vf (&c)[MR][NR], const float* a, int64_t am, int64_t ar, const float* b, int64_t br,
                           int64_t R) {
  for (int64_t r = 0; r < R; r++) {
    vf y[NR];
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) y[n] = load(b + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      const vf x = splat(a[m * am]);
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) c[m][n] = multiply_add<DOT>(c[m][n], x, y[n]);
    }
    a += ar;
    b += br;
  }
}

// Two rows as one row of bf16 pairs: low half x, high half y.
GDN_INLINE vf pair(vf x, vf y) {
#if defined(__AVX512BF16__)
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
#else
  const vu lo = __builtin_convertvector(to_bf16(x), vu), hi = __builtin_convertvector(to_bf16(y), vu);
  return (vf)(lo | (hi << 16));
#endif
}

// bf16 of two vectors, in order: 2 * LANES values in the space of LANES floats.
GDN_INLINE vf join(vf x, vf y) {
  struct {
    vh lo, hi;
  } both{to_bf16(x), to_bf16(y)};
  vf result;
  std::memcpy(&result, &both, sizeof result);
  return result;
}

}  // namespace gdn
