// What a request asks of sampling, in the form that the GPU takes it in (ops/sample.h).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/request.h"
#include "ops/sample.h"

namespace tinyvllm {

// The next token of one of the request's samples, from a row of logits; see Sampler::sample.
SampleRow sample_row(const Sequence& sequence, std::int32_t sample_index, std::int32_t logits_row);

// Appends what the request's logit_bias, min_tokens and penalties change in that row: nothing for
// most requests. The samples of a request that has not forked share a row and its edits.
void append_logit_edits(const Sequence& sequence, std::span<const std::int32_t> eos_token_ids,
                        std::int32_t logits_row, std::vector<LogitEdit>& edits);

}  // namespace tinyvllm
