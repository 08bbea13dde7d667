// Refusals of the tile formats and of attention on them: every message shows the value given and the value allowed, and
// nothing is written.
#include <gtest/gtest.h>

#include "support/tiles.h"

namespace kvpack::test {
namespace {

/// Two batches of 70 tokens of 64 channels as keys, and what goes with them; each test spoils one thing.
struct Call {
  explicit Call(std::int32_t bits = 16, CacheKind kind = CacheKind::kKey)
      : x(140, 64, DType::kFloat16), memory(kind, bits, 2, 70, 64, DType::kFloat16) {
    x.fill(Fill::kNormal, kSeed);
    view = as_batches(x, 2);
    out = memory.view();
  }
  [[nodiscard]] std::string compressing() const {
    return refusal([&] { compress_tile64(view, options, out, {}, used); });
  }
  [[nodiscard]] std::string unpacking() const {
    return refusal([&] { unpack_tile64(out, view); });
  }
  Matrix x;
  Tiles memory;
  TensorView view;
  Tile64 out;
  Tile64Options options;
  TensorView used;
};

/// Both the given and the allowed value stand in a message.
void expect_words(const std::string& message, const char* given, const char* allowed) {
  SCOPED_TRACE(std::string("expected words: ") + given + ", " + allowed);
  EXPECT_NE(message, "accepted");
  EXPECT_NE(message.find(given), std::string::npos) << message;
  EXPECT_NE(message.find(allowed), std::string::npos) << message;
}

template <typename Spoil>
std::string compressing(Spoil&& spoil, std::int32_t bits = 16) {
  Call call(bits);
  spoil(call);
  const std::string message = call.compressing();
  EXPECT_TRUE(call.memory.bitmaps.data()[0] == std::byte{0xFF}) << "something was written";
  return message;
}

TEST(Tile64Errors, OptionsOutOfTheirRange) {
  expect_words(compressing([](Call& c) { c.options.sparsity = 1.0; }), "sparsity is 1", "below 1");
  expect_words(compressing([](Call& c) { c.options.sparsity = NAN; }), "nan", "at least 0");
  expect_words(compressing([](Call& c) { c.options.rule = static_cast<PruneRule>(7); }), "7", "rule");
  expect_words(compressing([](Call& c) { c.options.channel_scores_batch_stride = -1; }), "-1", "at least 0");
}

TEST(Tile64Errors, PartsOfTheFormat) {
  expect_words(compressing([](Call& c) { c.out.bits = 3; }), "bits is 3", "1, 2, 4, 8 or 16");
  expect_words(compressing([](Call& c) { c.out.kind = static_cast<CacheKind>(5); }), "5", "0 (key) or 1 (value)");
  expect_words(compressing([](Call& c) { c.out.head_dim = 80; }), "80", "64, 128 or 256");
  expect_words(compressing([](Call& c) { c.out.tokens = -1; }), "-1", "0 to 2147483584");
  expect_words(compressing([](Call& c) { c.out.tokens = 200; }), "[2, 128]", "[2, 256]");
  expect_words(compressing([](Call& c) { c.out.bitmaps.rank = 1; }), "[2]", "[batches, tiles]");
  expect_words(compressing([](Call& c) { c.out.bitmaps.dtype = DType::kInt32; }), "int32", "int64");
  expect_words(compressing([](Call& c) { c.out.offsets.shape[1] = 128; }), "[2, 128]", "[2, 129]");
  expect_words(compressing([](Call& c) { c.out.offsets.strides[0] = 200; }), "[200, 1]", "contiguous");
  expect_words(compressing([](Call& c) { c.out.starts.shape[0] = 3; }), "[3]", "[2]");
  expect_words(compressing([](Call& c) { c.out.starts.data = nullptr; }), "out.starts", "no memory");
  expect_words(compressing([](Call& c) { c.out.payload.rank = 2; }), "out.payload", "[capacity]");
  expect_words(compressing([](Call& c) { c.out.payload.dtype = DType::kFloat32; }), "float32", "float16 or bfloat16");
  expect_words(compressing([](Call& c) { c.out.payload.dtype = DType::kBFloat16; }), "bfloat16", "expected float16");
  expect_words(compressing([](Call& c) { c.out.scales = c.out.starts; }), "out.scales", "empty");
  expect_words(compressing([](Call& c) { c.out.scales.shape[1] = 64; }, 2), "[2, 64]", "[2, 128]");
  expect_words(compressing([](Call& c) { c.out.starts = c.out.offsets; }, 2), "out.starts", "empty");
  expect_words(compressing([](Call& c) { c.out.payload.dtype = DType::kFloat16; }, 2), "float16", "int32");
  expect_words(compressing([](Call& c) { c.out.zeros.device = {DeviceKind::kCuda, 1}; }, 2), "cuda:1", "cpu");
}

TEST(Tile64Errors, TheDenseSide) {
  expect_words(compressing([](Call& c) { c.view.shape[1] = 69; }), "[2, 69, 64]", "[2, 70, 64]");
  expect_words(compressing([](Call& c) { c.view.rank = 2; }), "[2, 70]", "kv_heads");
  expect_words(compressing([](Call& c) { c.view.dtype = DType::kFloat64; }), "float64", "float32");
  expect_words(compressing([](Call& c) { c.view.strides[2] = 2; }), "2]", "must be 1");
  expect_words(compressing([](Call& c) { c.view.strides[0] = -64; }), "-64", "negative");
  expect_words(compressing([](Call& c) { c.view.data = nullptr; }), "x", "no memory");
  expect_words(compressing([](Call& c) { c.view.device = {DeviceKind::kCuda, 0}; }), "cuda:0", "cpu");
  expect_words(compressing([](Call& c) { c.view.shape[0] = INT64_MAX; }), "9223372036854775807", "2 matrices");
  expect_words(compressing([](Call& c) { c.used = make_view(c.out.offsets.data, DType::kInt64, {2}); }), "[2]", "[1]");
  expect_words(compressing([](Call& c) { c.used = make_view(c.out.offsets.data, DType::kInt64, {1}); }), "out.offsets",
               "used overlap");
  expect_words(compressing([](Call& c) { c.out.payload.data = c.view.data; }), "x and out.payload", "overlap");
  Call call;
  call.view.strides[1] = 0;
  expect_words(call.unpacking(), "0, 1]", "share memory");
}

TEST(Tile64Errors, SizesThatInt32OffsetsCannotReach) {
  expect_words(refusal([] { (void)tile64_payload_bound(16, 2, 1 << 30, 128, 128); }), "2 batches", "67108863 tiles");
  expect_words(refusal([] { (void)tile64_payload_bound(8, 1 << 20, 1 << 15, 128, 9); }), "1048576", "134217727 in all");
  expect_words(refusal([] { (void)tile64_payload_bound(8, -1, 1, 128, 9); }), "-1", "0 to 2147483647");
  expect_words(refusal([] { (void)tile64_payload_bound(8, 1, 1, 128, 129); }), "129", "0 to 128");
  expect_words(refusal([] { (void)tile64_tiles(INT64_MAX, 128); }), "9223372036854775807", "2147483584");
  EXPECT_EQ(tile64_workspace_bytes(16, 2, 100, 128, DeviceKind::kCpu), 0);
  EXPECT_GT(tile64_workspace_bytes(16, 2, 100, 128, DeviceKind::kCuda), 0);
}

TEST(Tile64Errors, FaultsInBytesNameBatchTileAndBothValues) {
  const auto checking = [](std::int32_t bits, auto&& spoil) {
    Call call(bits);
    call.options.sparsity = 0.5;
    compress(call.view, call.options, call.memory);
    spoil(call.memory);
    return refusal([&] { check_tile64(call.out); });
  };
  EXPECT_EQ(checking(16, [](Tiles&) {}), "accepted");
  expect_words(checking(16, [](Tiles& t) { t.starts.as<std::int32_t>()[1] = -4; }), "batch 1, tile 0", "-4");
  expect_words(checking(2, [](Tiles& t) { t.offsets.as<std::int32_t>()[130] = -9; }), "batch 1, tile 2", "-9");
  expect_words(checking(2, [](Tiles& t) { t.offsets.as<std::int32_t>()[1] = 900; }), "tile 0", "give it 900");
  expect_words(checking(16, [](Tiles& t) { t.offsets.as<std::int32_t>()[5] = 4; }), "batch 0, tile 5", "tile before");
  expect_words(checking(16, [](Tiles& t) { t.offsets.as<std::int32_t>()[128] = 1; }), "tile 128", "tile before");
  expect_words(checking(16, [](Tiles& t) { t.offsets.as<std::int32_t>()[7] = 1 << 30; }), "tile 6", "offsets give it");
  expect_words(checking(16, [](Tiles& t) { t.starts.as<std::int32_t>()[1] = 1 << 30; }), "batch 1",
               "payload, which has");
  expect_words(checking(4, [](Tiles& t) { t.bitmaps.as<std::uint64_t>()[3] = 0; }), "batch 0, tile 3", "takes 0");
  expect_words(checking(4, [](Tiles& t) { t.scales.as<float>()[3] = INFINITY; }), "tile 3: its scale is inf", "finite");
  expect_words(checking(4, [](Tiles& t) { t.zeros.as<float>()[3] = NAN; }), "tile 3: its zero is nan", "finite");
  expect_words(checking(4, [](Tiles& t) { t.zeros.as<float>()[3] = 1.5f; }), "1.5", "whole");
}

/// One call of attend_tile64: batch 2, kv_heads 1, group 2, two rows, three recent tokens.
struct AttendCall {
  AttendCall() : keys(4, CacheKind::kKey), values(16, CacheKind::kValue) {
    compress(keys.view, keys.options, keys.memory);
    compress(values.view, values.options, values.memory);
    q.fill(Fill::kNormal, kSeed);
    recent.fill(Fill::kNormal, kSeed);
    q_view = make_view(q.view().data, DType::kFloat16, {2, 2, 2, 64});
    out_view = make_view(out.view().data, DType::kFloat16, {2, 2, 2, 64});
    recent_keys = recent_values = make_view(recent.view().data, DType::kFloat16, {2, 1, 3, 64});
  }
  [[nodiscard]] std::string run() const {
    return refusal(
        [&] { attend_tile64(keys.out, values.out, q_view, recent_keys, recent_values, options, out_view, lse, {}); });
  }
  Call keys, values;
  Matrix q{8, 64, DType::kFloat16};
  Matrix out{8, 64, DType::kFloat16};
  Matrix recent{6, 64, DType::kFloat16};
  TensorView q_view, out_view, recent_keys, recent_values, lse;
  AttendOptions options;
};

template <typename Spoil>
std::string attending(Spoil&& spoil) {
  AttendCall call;
  spoil(call);
  const std::string message = call.run();
  EXPECT_TRUE(message == "accepted" || std::isnan(call.out.get(0, 0))) << "out was written";
  return message;
}

TEST(AttendErrors, CachesThatDoNotFitOneAnother) {
  EXPECT_EQ(attending([](AttendCall&) {}), "accepted");
  expect_words(attending([](AttendCall& c) { c.keys.out.kind = CacheKind::kValue; }), "keys.kind is 1", "expected 0");
  expect_words(attending([](AttendCall& c) { c.values.out.kind = CacheKind::kKey; }), "values.kind is 0", "expected 1");
  expect_words(attending([](AttendCall& c) { c.values.out.tokens = 69; }), "70 tokens", "69");
}

TEST(AttendErrors, QueriesOutputsAndTheWindow) {
  expect_words(attending([](AttendCall& c) { c.q_view.rank = 3; }), "[2, 2, 2]", "q_heads");
  expect_words(attending([](AttendCall& c) { c.q_view.shape[0] = 3; }), "3 sequences", "2 batches");
  expect_words(attending([](AttendCall& c) { c.q_view.shape[1] = 0; }), "0 heads", "the 1 of keys");
  expect_words(attending([](AttendCall& c) { c.q_view.shape[2] = 17; }), "17 rows", "1 to 16");
  expect_words(attending([](AttendCall& c) { c.q_view.shape[3] = 32; }), "[2, 2, 2, 32]", "[2, 2, 2, 64]");
  expect_words(attending([](AttendCall& c) { c.q_view.dtype = DType::kFloat64; }), "float64", "float32");
  expect_words(attending([](AttendCall& c) { c.out_view.dtype = DType::kBFloat16; }), "bfloat16", "float16");
  expect_words(attending([](AttendCall& c) { c.out_view.data = c.q_view.data; }), "out", "overlaps");
  expect_words(attending([](AttendCall& c) { c.lse = make_view(c.out.view().data, DType::kFloat32, {2, 2}); }),
               "[2, 2]", "[2, 2, 2]");
  expect_words(attending([](AttendCall& c) { c.recent_keys.shape[1] = 2; }), "[2, 2, 3, 64]", "recent_tokens, 64]");
  expect_words(attending([](AttendCall& c) { c.recent_keys.shape[2] = c.recent_values.shape[2] = -3; }),
               "[2, 1, -3, 64]", "recent_tokens, 64]");
  expect_words(attending([](AttendCall& c) { c.recent_values.shape[2] = 2; }), "[2, 1, 2, 64]", "3, 64]");
  expect_words(attending([](AttendCall& c) { c.recent_values = {}; }), "recent_values has shape []", "3, 64]");
  expect_words(attending([](AttendCall& c) { c.recent_keys.dtype = DType::kBFloat16; }), "bfloat16", "q is float16");
}

TEST(AttendErrors, Options) {
  expect_words(attending([](AttendCall& c) { c.options.scale = -1.0; }), "scale is -1", "1e-30 to 1e+30");
  expect_words(attending([](AttendCall& c) { c.options.scale = NAN; }), "scale is nan", "1e-30 to 1e+30");
  expect_words(attending([](AttendCall& c) { c.options.scale = 1e300; }), "scale is 1e+300", "1e-30 to 1e+30");
  expect_words(attending([](AttendCall& c) { c.options.softcap = -30.0; }), "softcap is -30", "or 0 for none");
  expect_words(attending([](AttendCall& c) { c.options.softcap = 1e-50; }), "softcap is 1e-50", "1e-30 to 1e+30");
  expect_words(attending([](AttendCall& c) { c.options.softcap = INFINITY; }), "softcap is inf", "1e+30");
  expect_words(attending([](AttendCall& c) { c.options.masking = static_cast<Masking>(3); }), "3", "masking");
  for (const std::int64_t recent : {0, 1}) {
    expect_words(attending([recent](AttendCall& c) {
                   c.options.masking = Masking::kCausal;
                   c.recent_keys.shape[2] = c.recent_values.shape[2] = recent;
                 }),
                 "last 2", ("there are " + std::to_string(recent)).c_str());
  }
  expect_words(refusal([] { (void)attend_workspace_bytes(2, 0, 64, 64, DeviceKind::kCpu); }), "columns is 0", "1 to");
  expect_words(refusal([] { (void)attend_workspace_bytes(2, INT64_MAX, 64, 64, DeviceKind::kCuda); }),
               "9223372036854775807", "1073741823");
  EXPECT_EQ(attend_workspace_bytes(2, 4, 64, 64, DeviceKind::kCpu), 0);
}

TEST(AttendErrors, AWindowOfNoSequences) {
  AttendCall c;
  const auto drop_batches = [](Tile64& tiles) {
    for (TensorView* view : {&tiles.bitmaps, &tiles.offsets, &tiles.scales, &tiles.zeros}) view->shape[0] = 0;
    if (tiles.bits == 16) tiles.starts.shape[0] = 0;
  };
  drop_batches(c.keys.out);
  drop_batches(c.values.out);
  c.q_view.shape[0] = c.out_view.shape[0] = 0;
  expect_words(c.run(), "recent_keys has shape [2, 1, 3, 64]", "[0, 0, recent_tokens, 64]");
  c.recent_keys = c.recent_values = {};
  EXPECT_EQ(c.run(), "accepted");
}

TEST(AttendErrors, Products) {
  AttendCall c;
  const auto keys = [&](std::initializer_list<std::int64_t> shape, std::initializer_list<std::int64_t> out_shape) {
    return refusal([&] {
      multiply_keys(c.keys.out, make_view(c.q.view().data, DType::kFloat16, shape),
                    make_view(c.out.view().data, DType::kFloat16, out_shape), {});
    });
  };
  expect_words(keys({3, 2, 64}, {3, 2, 70}), "3 heads", "the 2 batches of keys");
  expect_words(keys({2, 17, 64}, {2, 17, 70}), "17 rows", "1 to 16");
  expect_words(keys({2, 1, 32}, {2, 1, 70}), "[2, 1, 32]", "[2, 1, 64]");
  expect_words(keys({2, 1, 64}, {2, 1, 64}), "[2, 1, 64]", "[2, 1, 70]");
  expect_words(keys({2, 64}, {2, 1, 70}), "[2, 64]", "rows");
  expect_words(refusal([&] { multiply_values(c.keys.out, c.q_view, c.out_view, {}); }), "kind is 0", "expected 1");
}

}  // namespace
}  // namespace kvpack::test
