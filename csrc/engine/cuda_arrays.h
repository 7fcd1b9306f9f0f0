// How the plan of a step becomes what its kernels read: one flat batch, in arrays on the device that
// lie at the same addresses whenever the graph of its size is replayed.
//
// Sequences with one token in the step lead the batch, as decodes; those with several, and those that
// have just been admitted, lie behind them as chunks of prompts. A step of decodes alone is padded to
// the next batch size of a short list.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/context.h"
#include "cuda/memory.h"
#include "cuda/step_inputs.h"
#include "cuda/stream.h"
#include "engine/memory_sizes.h"
#include "engine/runner.h"
#include "model/transformer.h"
#include "ops/sample.h"

namespace tinyvllm {

// A step on the device: the batch, which of its rows have logits, and where its draws are described.
struct DeviceStep {
  Batch<CudaSequences> batch;
  bool padded = false;          // decodes alone: the logits of all rows are computed
  std::int32_t* tokens;         // those of the batch, where unknown ones are filled in
  const std::int32_t* sources;  // of each token: a draw of the step before, or -1
  // The block tables of the batch, and the entries that they are filled with (ops/block_tables.h).
  std::int32_t* block_tables;
  const std::int32_t* table_entries;
  const std::int32_t* table_starts;
  std::int32_t num_sequences;
  std::span<const std::int32_t> logit_rows;
  bool only_draws = false;  // no other logits are asked for
  // One for each draw of the plan, then padding. The host's are the caller's to write.
  StepInputs::Array<SampleRow> draws;
  std::int64_t num_draws;
};

class StepArrays {
 public:
  // batch_invariant: every token is a chunk. The context and the stream of the copies outlive it.
  StepArrays(const CudaContext& ctx, const cuda::Stream& copies, const StepLimits& limits,
             const ModelConfig& model, bool batch_invariant);

  // Writes the arrays of the step of this number on the host, all but its draws.
  DeviceStep fill(std::size_t number, const StepPlan& plan);
  // Sends them.
  void send() { inputs_.send(); }

  // Where a row of the plan that was filled in last lies in the batch, and its logits, or -1.
  std::int32_t row_of(std::int32_t plan_row) const {
    return rows_[static_cast<std::size_t>(plan_row)];
  }
  std::int32_t logits_of(std::int32_t plan_row) const {
    return logits_[static_cast<std::size_t>(row_of(plan_row))];
  }

 private:
  struct Entry {
    const Sequence* sequence;
    std::int64_t num_tokens;
    std::int64_t plan_row;  // of its first token
  };
  // What there is how much of in a batch.
  struct Counts {
    std::int64_t decodes, chunks;  // decodes padded
    std::int64_t rows;             // padded
    std::int64_t tiles;            // of the chunks
    std::int64_t split, splits;    // positions of a split of a decode, and their number
    std::int64_t blocks;           // of all block tables
    std::int64_t draws;            // padded
    std::int64_t sequences() const { return decodes + chunks; }
  };
  struct Arrays {
    StepInputs::Array<std::int32_t> tokens, sources, positions;
    StepInputs::Array<std::int64_t> slots;
    StepInputs::Array<std::int32_t> context_lengths, table_starts, num_items, logit_rows,
        chunk_starts, chunk_tiles;
    StepInputs::Array<SampleRow> draws;
    StepInputs::Array<std::int32_t> items;  // the work of the decodes, then the block tables
  };
  // How far they are written.
  struct Cursor {
    std::int32_t row = 0, sequence = 0, item = 0, entry = 0, tile = 0;
  };

  Counts sort(const StepPlan& plan);
  Arrays lay_out(std::size_t number, const Counts& counts);
  void write_sequence(const Entry& entry, const Arrays& arrays, Cursor& at);
  void write_items(std::int64_t context, std::int64_t split, const Arrays& arrays, Cursor& at);
  void write_decodes(const Counts& counts, const Arrays& arrays, Cursor& at);
  void write_chunks(const Counts& counts, const Arrays& arrays, Cursor& at);
  std::int32_t write_logit_rows(const StepPlan& plan, const Counts& counts, const Arrays& arrays);

  const StepLimits limits_;
  const std::int64_t num_heads_, num_kv_heads_;
  const std::int64_t max_blocks_;  // of a block table
  const bool batch_invariant_;
  StepInputs inputs_;
  cuda::DeviceMemory tables_;  // [padded sequences, max_blocks] int32

  std::vector<Entry> decodes_, chunks_;  // of the plan at hand
  std::vector<std::int32_t> rows_;       // of each row of the plan
  std::vector<std::int32_t> logits_;     // of each row of the batch
};

}  // namespace tinyvllm
