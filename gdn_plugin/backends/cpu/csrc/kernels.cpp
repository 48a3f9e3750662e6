// The entry points. This file is compiled once for every instruction-set level that is used, into its own library.
#include "arguments.h"
#include "common.h"
#include "conv.h"
#include "norm.h"
#include "prefill.h"
#include "recurrent.h"

using namespace gdn;

namespace {

int32_t check_verify(const VerifyArguments& p) {
  if (!offsets_fit(p.cu_seqlens, p.size.sequences, p.size.tokens)) return GDN_BAD_CU_SEQLENS;
  for (int64_t i = 0; i < p.size.sequences; i++) {
    const int64_t length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
    if (length > p.columns) return GDN_BAD_CU_SEQLENS;
    if (length == 0) continue;
    if (p.start_rows.data == nullptr && p.num_accepted_tokens[i] > p.columns) return GDN_BAD_ACCEPTED;
    if (origin_of(p, i) >= p.state.rows) return GDN_BAD_STATE_INDICES;
    for (int64_t t = 0; t < length; t++) {
      if (p.state_indices[i * p.state_indices_row + t] >= p.state.rows)
        return GDN_BAD_STATE_INDICES;
    }
  }
  return GDN_OK;
}

int32_t check_prologue(const PrologueArguments& p) {
  if (!offsets_fit(p.cu_seqlens, p.size.sequences, p.size.tokens)) return GDN_BAD_CU_SEQLENS;
  if (!rows_fit(p.state_indices, p.size.sequences, p.conv.pool.rows)) return GDN_BAD_STATE_INDICES;
  if (p.state.data != nullptr && !rows_fit(p.state_indices, p.size.sequences, p.state.rows))
    return GDN_BAD_STATE_INDICES;
  if (p.num_accepted_tokens.data == nullptr) return GDN_OK;
  for (int64_t i = 0; i < p.size.sequences; i++) {
    const int64_t length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
    if (length == 0 || is_padding(p.state_indices[i], p.null_index)) continue;
    if (p.conv.width - 2 + length > p.conv.pool.columns) return GDN_BAD_CU_SEQLENS;
    if (!p.has_initial_state[i]) continue;  // nothing is read
    if (p.num_accepted_tokens[i] + p.conv.width - 2 > p.conv.pool.columns) return GDN_BAD_ACCEPTED;
  }
  return GDN_OK;
}

int32_t check_checkpoints(const PrefillArguments& p) {
  if (p.checkpoints.data == nullptr || p.checkpoint_every <= 0) return GDN_OK;
  for (int64_t i = 0; i < p.size.sequences; i++) {
    const int64_t count = (p.cu_seqlens[i + 1] - p.cu_seqlens[i]) / p.checkpoint_every;
    if (is_padding(p.state_indices[i], p.null_index) || count == 0) continue;
    const int64_t first = p.checkpoint_cu_starts[i];
    if (first < 0 || first + count > p.checkpoints.rows) return GDN_BAD_CHECKPOINTS;
  }
  return GDN_OK;
}

}  // namespace

extern "C" {

int32_t gdn_prefill(const PrefillArguments* p) {
  if (!offsets_fit(p->cu_seqlens, p->size.sequences, p->size.tokens)) return GDN_BAD_CU_SEQLENS;
  if (!rows_fit(p->state_indices, p->size.sequences, p->state.rows)) return GDN_BAD_STATE_INDICES;
  if (const int32_t refusal = check_checkpoints(*p)) return refusal;
  // bf16 operands only where the caller's own are bf16: fp16 has more digits, fp32 far more.
  if (HAS_DOT && p->q.dtype == BF16) {
    prefill<HAS_DOT>(*p);
  } else {
    prefill<false>(*p);
  }
  return GDN_OK;
}

int32_t gdn_decode(const DecodeArguments* p) {
  if (!rows_fit(p->state_indices, p->size.sequences, p->state.rows)) return GDN_BAD_STATE_INDICES;
  decode(*p);
  return GDN_OK;
}

int32_t gdn_verify(const VerifyArguments* p) {
  if (const int32_t refusal = check_verify(*p)) return refusal;
  if (p->zero_padding) {
    const int64_t used = p->size.sequences > 0 ? p->cu_seqlens[p->size.sequences] : 0;
    zero_padding_rows(p->out, p->size, used, p->size.tokens);
  }
  verify(*p);
  return GDN_OK;
}

int32_t gdn_fused_decode(const FusedDecodeArguments* p) {
  if (!rows_fit(p->state_indices, p->size.sequences, std::min(p->state.rows, p->conv.pool.rows)))
    return GDN_BAD_STATE_INDICES;
  fused_decode(*p);
  return GDN_OK;
}

int32_t gdn_conv_prologue(const PrologueArguments* p) {
  if (const int32_t refusal = check_prologue(*p)) return refusal;
  conv_prologue(*p);
  return GDN_OK;
}

int32_t gdn_gated_norm(const GatedNormArguments* p) {
  gated_norm(*p);
  return GDN_OK;
}
}
