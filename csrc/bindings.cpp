// The torch ops memflow_cuda::*, one per kernel of launch.h, in the argument order of the other backends.
//
// Only the stable ABI of libtorch 2.10 is used, and nothing of Python: one binary for every torch from 2.10 on and every
// Python. The library loads without a GPU and on a torch without CUDA; its ops then say what they need.
#include "bindings.h"

namespace {

using namespace memflow;

Tensor frame_means(Tensor key, int64_t tokens_per_frame) {
  const Shape shape = shape_of("key", key);
  const int dtype = dtype_of("key", key);
  const int64_t frames = frame_count("key", shape.tokens, tokens_per_frame);
  const MemflowStates keys = states("key", key, shape, key.scalar_type());
  Launch on("frame_means", {{"key", key}});
  Tensor mean = on.empty(shape.with(frames), ScalarType::Float);
  on.check(memflow_frame_means(keys, dtype, shape.batch, frames, tokens_per_frame, shape.heads, shape.head_dim,
                               static_cast<float*>(mean.data_ptr()), on.stream));
  return mean;
}

Tensor prompt_relevance_mean(Tensor text_key, Tensor frame_mean, MaybeTensor text_mask, double scale) {
  const Shape text = shape_of("text_key", text_key);
  const int dtype = dtype_of("text_key", text_key);
  const int64_t frames = shape_of("frame_mean", frame_mean).tokens;
  const MemflowStates texts = states("text_key", text_key, text, text_key.scalar_type());
  const MemflowStates means = states("frame_mean", frame_mean, text.with(frames), ScalarType::Float);
  const MaybeTensor mask = flat("text_mask", text_mask, {text.batch, text.tokens}, ScalarType::Bool);
  Launch on("prompt_relevance_mean", {{"text_key", text_key}, {"frame_mean", frame_mean}, {"text_mask", mask}});
  Tensor score = on.empty({text.batch, frames}, ScalarType::Float);
  void* workspace =
      on.workspace(memflow_prompt_relevance_mean_workspace(text.batch, text.tokens, text.heads, text.head_dim));
  on.check(memflow_prompt_relevance_mean(texts, dtype, pointer<uint8_t>(mask), means, text.batch, text.tokens, frames,
                                         text.heads, text.head_dim, scale, static_cast<float*>(score.data_ptr()),
                                         workspace, on.stream));
  return score;
}

Tensor prompt_relevance_token(Tensor text_key, Tensor frame_mean, MaybeTensor text_mask, double scale) {
  const Shape text = shape_of("text_key", text_key);
  const int dtype = dtype_of("text_key", text_key);
  const int64_t frames = shape_of("frame_mean", frame_mean).tokens;
  const MemflowStates texts = states("text_key", text_key, text, text_key.scalar_type());
  const MemflowStates means = states("frame_mean", frame_mean, text.with(frames), ScalarType::Float);
  const MaybeTensor mask = flat("text_mask", text_mask, {text.batch, text.tokens}, ScalarType::Bool);
  Launch on("prompt_relevance_token", {{"text_key", text_key}, {"frame_mean", frame_mean}, {"text_mask", mask}});
  Tensor score = on.empty({text.batch, text.tokens, frames}, ScalarType::Float);
  on.check(memflow_prompt_relevance_token(texts, dtype, pointer<uint8_t>(mask), means, text.batch, text.tokens, frames,
                                          text.heads, text.head_dim, scale, static_cast<float*>(score.data_ptr()),
                                          on.stream));
  return score;
}

Tensor cover_frames(Tensor scores, Tensor weights, int64_t k, Tensor prior) {
  if (scores.dim() != 3) fail("scores must have 3 dimensions, got the shape ", listed(scores.sizes()));
  const int dtype = dtype_of("scores", scores);
  const int64_t rows = scores.size(0), tokens = scores.size(1), frames = scores.size(2);
  if (k < 0) fail("k must be at least 0, got ", k);
  const MaybeTensor all = flat("scores", scores, {rows, tokens, frames}, scores.scalar_type());
  const MaybeTensor counts = flat("weights", weights, {rows, tokens}, ScalarType::Float);
  const MaybeTensor before = flat("prior", prior, {rows, frames}, ScalarType::Float);
  Launch on("cover_frames", {{"scores", all}, {"weights", counts}, {"prior", before}});
  Tensor table = on.empty({rows, k < frames ? k : frames}, ScalarType::Int);
  on.check(memflow_cover_frames(pointer<void>(all), dtype, pointer<float>(counts), pointer<float>(before), rows, tokens,
                                frames, k, static_cast<int32_t*>(table.data_ptr()), on.stream));
  return table;
}

Tensor prompt_relevance_softmax(Tensor text_key, Tensor key, MaybeTensor text_mask, int64_t tokens_per_frame,
                                double scale) {
  const Shape text = shape_of("text_key", text_key);
  const int dtype = dtype_of("text_key", text_key);
  const int64_t tokens = shape_of("key", key).tokens;
  const int64_t frames = frame_count("key", tokens, tokens_per_frame);
  const MemflowStates texts = states("text_key", text_key, text, text_key.scalar_type());
  const MemflowStates keys = states("key", key, text.with(tokens), text_key.scalar_type());
  const MaybeTensor mask = flat("text_mask", text_mask, {text.batch, text.tokens}, ScalarType::Bool);
  Launch on("prompt_relevance_softmax", {{"text_key", text_key}, {"key", key}, {"text_mask", mask}});
  Tensor score = on.empty({text.batch, frames}, ScalarType::Float);
  void* workspace =
      on.workspace(memflow_prompt_relevance_softmax_workspace(text.batch, text.tokens, text.heads, frames));
  on.check(memflow_prompt_relevance_softmax(texts, keys, dtype, pointer<uint8_t>(mask), text.batch, text.tokens, frames,
                                            tokens_per_frame, text.heads, text.head_dim, scale,
                                            static_cast<float*>(score.data_ptr()), workspace, on.stream));
  return score;
}

// ceil(queries / query_block); 1 without a query_block.
int64_t block_count(int64_t queries, std::optional<int64_t> query_block) {
  if (query_block && *query_block < 1) fail("query_block must be at least 1, got ", *query_block);
  return query_block ? (queries + *query_block - 1) / *query_block : 1;
}

Tensor select_frames(Tensor query, Tensor frame_mean, int64_t top_k, MaybeTensor valid,
                     std::optional<int64_t> query_block) {
  const Shape shape = shape_of("query", query);
  const int dtype = dtype_of("query", query);
  const int64_t frames = shape_of("frame_mean", frame_mean).tokens;
  const int64_t blocks = block_count(shape.tokens, query_block);
  if (top_k < 1) fail("top_k must be at least 1, got ", top_k);
  const int64_t places = top_k < frames ? top_k : frames;
  const MemflowStates queries = states("query", query, shape, query.scalar_type());
  const MemflowStates means = states("frame_mean", frame_mean, shape.with(frames), ScalarType::Float);
  const MaybeTensor free = flat("valid", valid, {shape.batch, frames}, ScalarType::Bool);
  Launch on("select_frames", {{"query", query}, {"frame_mean", frame_mean}, {"valid", free}});
  const Sizes whole = {shape.batch, shape.heads, places}, parts = {shape.batch, shape.heads, blocks, places};
  Tensor table = on.empty(query_block ? parts : whole, ScalarType::Int);
  // One query per block is its own mean: qk_norm_rope_write has then taken it already.
  const bool known = blocks == shape.tokens && dtype == MEMFLOW_FLOAT32 && query.is_contiguous();
  const int64_t bytes = memflow_select_frames_workspace(shape.batch, shape.tokens, shape.heads, shape.head_dim,
                                                        query_block.value_or(0));
  on.check(memflow_select_frames(queries, dtype, known ? static_cast<const float*>(query.data_ptr()) : nullptr, means,
                                 pointer<uint8_t>(free), shape.batch, shape.tokens, frames, shape.heads,
                                 shape.head_dim, top_k, query_block.value_or(0),
                                 static_cast<int32_t*>(table.data_ptr()), on.workspace(known ? 0 : bytes), on.stream));
  return table;
}

std::tuple<Tensor, Tensor> memory_attention(Tensor query, Tensor key, Tensor value, MaybeTensor frame_table,
                                            int64_t tokens_per_frame, int64_t candidate_frames, double scale,
                                            std::optional<int64_t> query_block) {
  const Shape shape = shape_of("query", query);
  const int dtype = dtype_of("query", query);
  if (!memflow_memory_attention_supported(dtype, shape.head_dim))
    fail("memory_attention takes bfloat16 and float16 with head size D = 64 or 128, got ",
         toString(query.scalar_type()), " with D = ", shape.head_dim);
  const int64_t tokens = shape_of("key", key).tokens;
  const int64_t frames = frame_count("key", tokens, tokens_per_frame);
  const int64_t blocks = block_count(shape.tokens, query_block);
  if (candidate_frames < 0 || candidate_frames > frames)
    fail("candidate_frames must be from 0 to the ", frames, " frames of key, got ", candidate_frames);
  const MemflowStates queries = states("query", query, shape, query.scalar_type());
  const MemflowStates keys = states("key", key, shape.with(tokens), query.scalar_type());
  const MemflowStates values = states("value", value, shape.with(tokens), query.scalar_type());
  int64_t places = 0;
  if (frame_table && frame_table->dim() > 0) places = frame_table->size(frame_table->dim() - 1);
  const Sizes whole = {shape.batch, shape.heads, places}, parts = {shape.batch, shape.heads, blocks, places};
  const MaybeTensor table = flat("frame_table", frame_table, query_block ? parts : whole, ScalarType::Int);
  Launch on("memory_attention", {{"query", query}, {"key", key}, {"value", value}, {"frame_table", table}});
  Tensor out = on.empty(shape.with(shape.tokens), query.scalar_type());
  Tensor lse = on.empty({shape.batch, shape.heads, shape.tokens}, ScalarType::Float);
  void* workspace = on.workspace(memflow_memory_attention_workspace(
      dtype, shape.batch, shape.tokens, frames, tokens_per_frame, shape.heads, shape.head_dim, places,
      table ? candidate_frames : 0, query_block.value_or(0)));
  on.check(memflow_memory_attention(queries, keys, values, dtype, pointer<int32_t>(table), shape.batch, shape.tokens,
                                    frames, tokens_per_frame, shape.heads, shape.head_dim, places,
                                    table ? candidate_frames : 0, query_block.value_or(0), scale, out.data_ptr(),
                                    static_cast<float*>(lse.data_ptr()), workspace, on.stream));
  return {out, lse};
}

// The parts of a pool of `slots` slots, each of `tokens` tokens per slot.
struct PoolStates {
  PoolStates(const Tensor& pool_key, const Tensor& pool_value, const Tensor& pool_frame_mean, ScalarType dtype)
      : shape(shape_of("pool_key", pool_key)), slots(shape_of("pool_frame_mean", pool_frame_mean).tokens) {
    if (slots < 1 || shape.tokens % slots)
      fail("pool_key has ", shape.tokens, " tokens, not a multiple of the ", slots, " slots of pool_frame_mean");
    tokens = shape.tokens / slots;
    key = states("pool_key", pool_key, shape, dtype);
    value = states("pool_value", pool_value, shape, dtype);
    mean = states("pool_frame_mean", pool_frame_mean, shape.with(slots), ScalarType::Float);
  }
  Shape shape;
  int64_t slots, tokens;
  MemflowStates key, value, mean;
};

std::tuple<Tensor, Tensor> qk_norm_rope_write(Tensor query, Tensor key, Tensor value, MaybeTensor weight_q,
                                              MaybeTensor weight_k, double eps, int64_t rows, int64_t cols,
                                              int64_t start_frame, MaybeTensor start, Tensor pool_key,
                                              Tensor pool_value, Tensor pool_frame_mean, Tensor slots,
                                              bool query_mean) {
  const Shape shape = shape_of("query", query);
  const int dtype = dtype_of("query", query);
  if (rows < 1 || cols < 1) fail("rows and cols must be at least 1, got ", rows, " and ", cols);
  const int64_t frames = frame_count("query", shape.tokens, rows * cols);
  const MemflowStates queries = states("query", query, shape, query.scalar_type());
  const MemflowStates keys = states("key", key, shape, query.scalar_type());
  const MemflowStates values = states("value", value, shape, query.scalar_type());
  const PoolStates pool(pool_key, pool_value, pool_frame_mean, query.scalar_type());
  check_shape("pool_key", pool_key, {shape.batch, pool.slots * rows * cols, shape.heads, shape.head_dim});
  const Sizes width = {shape.heads * shape.head_dim};
  if (weight_q.has_value() != weight_k.has_value()) fail("weight_q and weight_k go together, one is missing");
  const int dtype_q = weight_q ? dtype_of("weight_q", *weight_q) : dtype;
  const int dtype_k = weight_k ? dtype_of("weight_k", *weight_k) : dtype;
  const MaybeTensor scale_q = weight_q ? flat("weight_q", weight_q, width, weight_q->scalar_type()) : weight_q;
  const MaybeTensor scale_k = weight_k ? flat("weight_k", weight_k, width, weight_k->scalar_type()) : weight_k;
  const MaybeTensor places = flat("slots", slots, {frames}, ScalarType::Int);
  if (start && start->scalar_type() != ScalarType::Int) check_dtype("start", *start, ScalarType::Long);
  if (start && start->numel() != 1) fail("start must hold one number, got the shape ", listed(start->sizes()));
  Launch on("qk_norm_rope_write", {{"query", query},
                                   {"key", key},
                                   {"value", value},
                                   {"weight_q", scale_q},
                                   {"weight_k", scale_k},
                                   {"start", start},
                                   {"pool_key", pool_key},
                                   {"pool_value", pool_value},
                                   {"pool_frame_mean", pool_frame_mean},
                                   {"slots", places}});
  Tensor new_query = on.empty(shape.with(shape.tokens), query.scalar_type());
  const Sizes mean_shape = {shape.batch, shape.heads, shape.head_dim};
  Tensor mean = on.empty(query_mean ? mean_shape : Sizes{0}, ScalarType::Float);
  void* workspace = on.workspace(
      memflow_qk_norm_rope_write_workspace(shape.batch, frames, rows * cols, shape.heads, shape.head_dim, query_mean));
  on.check(memflow_qk_norm_rope_write(
      queries, keys, values, dtype, pointer<void>(scale_q), dtype_q, pointer<void>(scale_k), dtype_k, shape.batch,
      frames, rows, cols, shape.heads, shape.head_dim, eps, start_frame, pointer<void>(start),
      start ? static_cast<int>(start->element_size()) : 0, pool.key, pool.value, pool.mean, pool.slots,
      pointer<int32_t>(places), new_query.data_ptr(), query_mean ? static_cast<float*>(mean.data_ptr()) : nullptr,
      workspace, on.stream));
  return {new_query, mean};
}

void replace_frame(Tensor pool_key, Tensor pool_value, Tensor pool_frame_mean, Tensor slot, Tensor source_slot) {
  const int dtype = dtype_of("pool_key", pool_key);
  const PoolStates pool(pool_key, pool_value, pool_frame_mean, pool_key.scalar_type());
  const MaybeTensor to = flat("slot", slot, {pool.shape.batch}, ScalarType::Int);
  const MaybeTensor from = flat("source_slot", source_slot, {pool.shape.batch}, ScalarType::Int);
  Launch on("replace_frame", {{"pool_key", pool_key},
                              {"pool_value", pool_value},
                              {"pool_frame_mean", pool_frame_mean},
                              {"slot", to},
                              {"source_slot", from}});
  on.check(memflow_replace_frame(pool.key, pool.value, pool.mean, dtype, pool.shape.batch, pool.slots, pool.tokens,
                                 pool.shape.heads, pool.shape.head_dim, pointer<int32_t>(to), pointer<int32_t>(from),
                                 on.stream));
}

std::tuple<Tensor, Tensor> gather_frames(Tensor key, Tensor value, Tensor frame_table, int64_t tokens_per_frame,
                                         int64_t candidate_frames) {
  const Shape shape = shape_of("key", key);
  const int dtype = dtype_of("key", key);
  const int64_t frames = frame_count("key", shape.tokens, tokens_per_frame);
  if (candidate_frames < 0 || candidate_frames > frames)
    fail("candidate_frames must be from 0 to the ", frames, " frames of key, got ", candidate_frames);
  const MemflowStates keys = states("key", key, shape, key.scalar_type());
  const MemflowStates values = states("value", value, shape, key.scalar_type());
  const int64_t places = frame_table.dim() == 3 ? frame_table.size(2) : 0;
  const MaybeTensor table = flat("frame_table", frame_table, {shape.batch, shape.heads, places}, ScalarType::Int);
  Launch on("gather_frames", {{"key", key}, {"value", value}, {"frame_table", table}});
  const int64_t packed = (places + frames - candidate_frames) * tokens_per_frame;
  const Sizes heads_first = {shape.batch, shape.heads, packed, shape.head_dim};
  Tensor packed_key = on.empty(heads_first, key.scalar_type()), packed_value = on.empty(heads_first, key.scalar_type());
  on.check(memflow_gather_frames(keys, values, dtype, pointer<int32_t>(table), shape.batch, frames, tokens_per_frame,
                                 shape.heads, shape.head_dim, places, candidate_frames, packed_key.data_ptr(),
                                 packed_value.data_ptr(), on.stream));
  return {packed_key, packed_value};
}

// The architectures that the kernels were compiled for, as the build was asked for them.
std::string architectures() { return MEMFLOW_ARCHITECTURES; }

// Why the CUDA runtime in this library cannot work here, e.g. a driver that is too old for it; empty where it can.
std::string runtime_error() {
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  return code == cudaSuccess ? "" : cudaGetErrorString(code);
}

}  // namespace

STABLE_TORCH_LIBRARY(memflow_cuda, m) {
  m.def("frame_means(Tensor key, int tokens_per_frame) -> Tensor");
  m.def("prompt_relevance_mean(Tensor text_key, Tensor frame_mean, Tensor? text_mask, float scale) -> Tensor");
  m.def(
      "prompt_relevance_softmax(Tensor text_key, Tensor key, Tensor? text_mask, int tokens_per_frame, float scale)"
      " -> Tensor");
  m.def("prompt_relevance_token(Tensor text_key, Tensor frame_mean, Tensor? text_mask, float scale) -> Tensor");
  m.def("cover_frames(Tensor scores, Tensor weights, int k, Tensor prior) -> Tensor");
  m.def("select_frames(Tensor query, Tensor frame_mean, int top_k, Tensor? valid, int? query_block) -> Tensor");
  m.def(
      "memory_attention(Tensor query, Tensor key, Tensor value, Tensor? frame_table, int tokens_per_frame,"
      " int candidate_frames, float scale, int? query_block) -> (Tensor, Tensor)");
  m.def(
      "qk_norm_rope_write(Tensor query, Tensor key, Tensor value, Tensor? weight_q, Tensor? weight_k, float eps,"
      " int rows, int cols, int start_frame, Tensor? start, Tensor(a!) pool_key, Tensor(b!) pool_value,"
      " Tensor(c!) pool_frame_mean, Tensor slots, bool query_mean) -> (Tensor, Tensor)");
  m.def(
      "replace_frame(Tensor(a!) pool_key, Tensor(b!) pool_value, Tensor(c!) pool_frame_mean, Tensor slot,"
      " Tensor source_slot) -> ()");
  m.def(
      "gather_frames(Tensor key, Tensor value, Tensor frame_table, int tokens_per_frame, int candidate_frames)"
      " -> (Tensor, Tensor)");
  m.def("architectures() -> str");
  m.def("runtime_error() -> str");
}

// For tensors of every device: so that one on the CPU is told what is wrong with it, by the checks above.
STABLE_TORCH_LIBRARY_IMPL(memflow_cuda, CompositeExplicitAutograd, m) {
  m.impl("frame_means", TORCH_BOX(&frame_means));
  m.impl("prompt_relevance_mean", TORCH_BOX(&prompt_relevance_mean));
  m.impl("prompt_relevance_softmax", TORCH_BOX(&prompt_relevance_softmax));
  m.impl("prompt_relevance_token", TORCH_BOX(&prompt_relevance_token));
  m.impl("cover_frames", TORCH_BOX(&cover_frames));
  m.impl("select_frames", TORCH_BOX(&select_frames));
  m.impl("memory_attention", TORCH_BOX(&memory_attention));
  m.impl("qk_norm_rope_write", TORCH_BOX(&qk_norm_rope_write));
  m.impl("replace_frame", TORCH_BOX(&replace_frame));
  m.impl("gather_frames", TORCH_BOX(&gather_frames));
  m.impl("architectures", TORCH_BOX(&architectures));
  m.impl("runtime_error", TORCH_BOX(&runtime_error));
}
