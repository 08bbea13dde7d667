// Entry of transform-coded rows: checks, dispatch. What is computed: rules.h and klt_ref.cpp; bytes: formats/klt_rows/layout.h.
#include <algorithm>

#include "core/check.h"
#include "core/sequences.h"
#include "core/with_type.h"
#include "dispatch/registry.h"
#include "formats/klt_rows/codec_ref.h"
#include "klt/finite.h"
#include "klt/implementations.h"
#include "klt/rules.h"
#include "klt/table.h"

namespace kvpack {

namespace {

std::int64_t tokens_of(const TensorView& view) { return view.shape[static_cast<std::size_t>(view.rank - 2)]; }

/// Checks a dense side [tokens, channels] or [batch, tokens, channels].
KltMatrix checked_matrix(const TensorView& view, const char* name, std::int64_t channels) {
  require_same_sequences(view, name, view, name);
  const std::int64_t width = view.shape[static_cast<std::size_t>(view.rank - 1)];
  require(width == channels, name, " of shape ", shape_text(view), " has ", width, " channels; the table has ",
          channels);
  const TensorView one = sequence(view, 0);
  return {view.data, view.dtype, view.rank == 3 ? view.strides[0] : 0, one.strides[0], one.strides[1]};
}

/// The same for a side that is written.
KltMatrix checked_target(const TensorView& view, std::int64_t channels) {
  const KltMatrix matrix = checked_matrix(view, "out", channels);
  for (int i = 0; i < view.rank && view.num_elements() > 0; ++i) {
    const auto axis = static_cast<std::size_t>(i);
    require(view.shape[axis] == 1 || view.strides[axis] > 0, "out has the strides ", text_of(view.strides, view.rank),
            "; several of its elements would share memory");
  }
  return matrix;
}

KltRowsData checked_rows(const TensorView& rows, const TensorView& dense, const char* dense_name,
                         std::int64_t row_bytes) {
  require(rows.dtype == DType::kUInt8, "rows is ", name_of(rows.dtype), "; expected uint8");
  require(rows.rank == dense.rank, "rows has shape ", shape_text(rows), " but ", dense_name, " has ",
          shape_text(dense));
  for (int i = 0; i + 1 < rows.rank; ++i) {
    const auto axis = static_cast<std::size_t>(i);
    require(rows.shape[axis] == dense.shape[axis], "rows has shape ", shape_text(rows), " but ", dense_name, " has ",
            shape_text(dense));
  }
  require(rows.device == dense.device, "rows is on ", device_text(rows.device), " but ", dense_name, " is on ",
          device_text(dense.device));
  const auto last = static_cast<std::size_t>(rows.rank - 1);
  require(rows.shape[last] == row_bytes, "rows has rows of ", rows.shape[last], " bytes; the table's take ", row_bytes);
  const TensorView one = sequence(rows, 0);
  if (rows.num_elements() > 0) {
    require(one.is_contiguous(), "rows has the strides ", text_of(rows.strides, rows.rank),
            "; the rows of a sequence lie without gaps");
    require(rows.rank == 2 || rows.shape[0] == 1 || rows.strides[0] >= one.num_elements(), "rows has the strides ",
            text_of(rows.strides, rows.rank), "; its sequences overlap");
    require(rows.data != nullptr, "rows of shape ", shape_text(rows), " has no memory");
  }
  return {static_cast<std::uint8_t*>(rows.data), rows.rank == 3 ? rows.strides[0] : 0};
}

void require_apart_from_table(const TensorView& target, const char* name, const KltTable& table) {
  for (const TensorView* part : {&table.mean, &table.analysis, &table.synthesis, &table.in_scale, &table.centroids}) {
    require(!may_overlap(target, *part), name, " overlaps the table in memory");
  }
}

void require_finite(const KltMatrix& matrix, const TensorView& x, std::int64_t first_token) {
  if (x.device.kind != DeviceKind::kCpu) return;
  const std::int64_t channels = x.shape[static_cast<std::size_t>(x.rank - 1)];
  const KltPlace place = klt::find_nonfinite(matrix, num_sequences(x), tokens_of(x), channels, first_token);
  if (place.sequence < 0) return;
  const float value = with_float_type(x.dtype, [&]<typename T>() {
    return to_float(
        static_cast<const T*>(x.data)[place.sequence * matrix.sequence_stride + place.token * matrix.token_stride +
                                      place.channel * matrix.channel_stride]);
  });
  throw InvalidArgument(text("x holds ", value, " at sequence ", place.sequence, ", token ", place.token, ", channel ",
                             place.channel, "; it must be finite"));
}

void copy_first_tokens(const TensorView& x, const TensorView& out, std::int64_t tokens) {
  for (std::int64_t s = 0; s < num_sequences(x) && tokens > 0; ++s) {
    TensorView source = sequence(x, s);
    TensorView target = sequence(out, s);
    source.shape[0] = target.shape[0] = tokens;
    copy_sequence(source, target);
  }
}

KltRopeData checked_rope(const KltRope& rope, const TensorView& out, std::int64_t channels) {
  if (rope.head_dim == 0) return {};
  require(rope.head_dim > 0 && channels % rope.head_dim == 0, "rope.head_dim is ", rope.head_dim,
          "; it must divide the ", channels, " channels");
  require(rope.cos.rank == 2, "rope.cos has shape ", shape_text(rope.cos), "; it is [tokens, width]");
  const std::int64_t width = rope.cos.shape[1];
  require(width >= 2 && width % 2 == 0 && width <= rope.head_dim, "rope.cos has width ", width,
          "; it is even, at least 2 and at most head_dim ", rope.head_dim);
  require_exact(rope.cos, {"rope", "cos"}, DType::kFloat32, {tokens_of(out), width}, out.device);
  require_exact(rope.sin, {"rope", "sin"}, DType::kFloat32, {tokens_of(out), width}, out.device);
  require(!may_overlap(rope.cos, out) && !may_overlap(rope.sin, out), "out overlaps rope in memory");
  return {static_cast<std::int32_t>(rope.head_dim), static_cast<std::int32_t>(width),
          static_cast<const float*>(rope.cos.data), static_cast<const float*>(rope.sin.data)};
}

std::string describe(const klt_rows::RowFinding& finding) {
  switch (finding.fault) {
    case klt_rows::RowFault::kScale:
      return text("its scale is ", to_float(Half{static_cast<std::uint16_t>(klt_scale_bits(finding.actual))}),
                  "; it must be finite and at least 0");
    case klt_rows::RowFault::kDigits:
      return text("the digits at bit ", finding.bit, " are ", finding.actual, "; they must be below ",
                  finding.expected);
    case klt_rows::RowFault::kPadding:
      return text("bit ", finding.bit, " is ", finding.actual, "; it is padding and must be ", finding.expected);
    case klt_rows::RowFault::kNone:
      break;
  }
  return "nothing is wrong";
}

}  // namespace

void simulate_klt(const TensorView& x, const KltTable& table, const KltOptions& options, const TensorView& out,
                  void* stream) {
  require_sequence_pair(x, out);
  require(options.protected_tokens >= 0, "protected_tokens is ", options.protected_tokens, "; it must be at least 0");
  SimulateKltProblem problem;
  problem.table = klt::checked_table(table, x.device);
  problem.x = checked_matrix(x, "x", table.channels);
  problem.out = checked_target(out, table.channels);
  require_apart_from_table(out, "out", table);
  problem.sequences = num_sequences(x);
  problem.tokens = tokens_of(x);
  problem.protected_tokens = std::min(options.protected_tokens, problem.tokens);
  problem.stream = stream;
  const auto function = select<SimulateKltFunction>(Operation::kSimulateKlt, x.device.kind);
  if (x.num_elements() == 0) return;
  require_finite(problem.x, x, problem.protected_tokens);
  if (x.device.kind == DeviceKind::kCpu) copy_first_tokens(x, out, problem.protected_tokens);
  function(problem);
}

void compress_klt(const TensorView& x, const KltTable& table, const TensorView& rows, void* stream) {
  CompressKltProblem problem;
  problem.x = checked_matrix(x, "x", table.channels);
  problem.table = klt::checked_table(table, x.device);
  problem.rows = checked_rows(rows, x, "x", problem.table.layout.row_bytes);
  require(!may_overlap(x, rows), "x and rows overlap in memory");
  require_apart_from_table(rows, "rows", table);
  problem.sequences = num_sequences(x);
  problem.tokens = tokens_of(x);
  problem.stream = stream;
  const auto function = select<CompressKltFunction>(Operation::kCompressKlt, x.device.kind);
  if (x.num_elements() == 0) return;
  require_finite(problem.x, x, 0);
  if (problem.table.layout.coded > 0) function(problem);
}

void unpack_klt(const TensorView& rows, const KltTable& table, const KltRope& rope, const TensorView& out,
                void* stream) {
  UnpackKltProblem problem;
  problem.out = checked_target(out, table.channels);
  problem.table = klt::checked_table(table, out.device);
  problem.rows = checked_rows(rows, out, "out", problem.table.layout.row_bytes);
  problem.rope = checked_rope(rope, out, table.channels);
  require(!may_overlap(out, rows), "out and rows overlap in memory");
  require_apart_from_table(out, "out", table);
  problem.sequences = num_sequences(out);
  problem.tokens = tokens_of(out);
  problem.stream = stream;
  const auto function = select<UnpackKltFunction>(Operation::kUnpackKlt, out.device.kind);
  if (out.num_elements() > 0) function(problem);
}

void check_klt(const TensorView& rows, const KltTable& table) {
  require(rows.rank == 2 || rows.rank == 3, "rows has shape ", shape_text(rows),
          "; it is [tokens, bytes] or [batch, tokens, bytes]");
  require(rows.device.kind == DeviceKind::kCpu, "rows is on ", device_text(rows.device), "; check_klt reads on cpu");
  const klt_rows::RowLayout layout = klt::layout_of(table.levels, table.coefficients, table.row_alignment);
  const KltRowsData data = checked_rows(rows, rows, "rows", layout.row_bytes);
  for (std::int64_t s = 0; s < num_sequences(rows); ++s) {
    for (std::int64_t t = 0; t < tokens_of(rows); ++t) {
      const klt_rows::RowFinding finding =
          klt_rows::check_row(layout, data.data + s * data.sequence_stride + t * layout.row_bytes);
      require(finding.fault == klt_rows::RowFault::kNone, "row of sequence ", s, ", token ", t, ": ",
              describe(finding));
    }
  }
}

}  // namespace kvpack
