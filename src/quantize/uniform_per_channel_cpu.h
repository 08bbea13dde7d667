// Per channel: a task takes a tile of a few vectors of channels and sweeps its tokens. One lane owns one channel, so
// statistics need no shuffles; the tile stays in the second cache level where it fits.
//
//   channels ->  c0 .. c15 | c16 .. c31 | ...
//   token 0      x x ... x | x x ... x        sweep 1: extremes per block of tokens (one block without outliers)
//   token 1      x x ... x | x x ... x        sweep 2: with outliers only, the elements beyond each channel's pivots
//   ...                                       sweep 3: quantise and write

namespace kvpack::KVPACK_ISA {
namespace {

/// One task's part of the matrix: some vectors of channels over `tokens` tokens.
template <typename T>
struct Tile {
  const T* x;
  T* out;
  std::int64_t x_stride;  // elements from token to token
  std::int64_t out_stride;
  std::int64_t tokens;
};

/// Per-channel parameters of a tile, one float a channel.
template <int kWidth>
struct TileParams {
  float qs[kWidth * kLanes];
  float offset[kWidth * kLanes];
  float upper[kWidth * kLanes];
  float lower[kWidth * kLanes];
};

/// Sweep 1: extremes of `blocks` runs of tokens, [blocks][kWidth * kLanes] each. Tokens beyond the last whole run are
/// looked at only when there is one block. Returns false when a value is not finite.
template <int kWidth, typename T>
inline bool find_extremes(const Tile<T>& tile, std::int64_t blocks, float* lows, float* highs) {
  const std::int64_t run = tile.tokens / blocks;
  Mask bad = mask_from_bits(0);
  for (std::int64_t b = 0; b < blocks; ++b) {
    F32 low[kWidth];
    F32 high[kWidth];
    for (int v = 0; v < kWidth; ++v) {
      low[v] = set1(std::numeric_limits<float>::infinity());
      high[v] = set1(-std::numeric_limits<float>::infinity());
    }
    const T* row = tile.x + b * run * tile.x_stride;
    for (std::int64_t t = 0; t < run; ++t, row += tile.x_stride) {
      for (int v = 0; v < kWidth; ++v) {
        const F32 value = load(row + v * kLanes);
        low[v] = min(value, low[v]);
        high[v] = max(value, high[v]);
        bad = either(bad, is_nonfinite(value));
      }
    }
    for (int v = 0; v < kWidth; ++v) {
      store(lows + (b * kWidth + v) * kLanes, low[v]);
      store(highs + (b * kWidth + v) * kLanes, high[v]);
    }
  }
  const T* row = tile.x + blocks * run * tile.x_stride;
  for (std::int64_t t = blocks * run; t < tile.tokens; ++t, row += tile.x_stride) {
    for (int v = 0; v < kWidth; ++v) bad = either(bad, is_nonfinite(load(row + v * kLanes)));
  }
  return bits(bad) == 0;
}

/// Appends the elements of one register that `lanes` marks to their channels' lists.
template <typename T>
inline void append(const T* source, std::uint32_t lanes, float* lists, std::int64_t* counts, std::int64_t capacity) {
  while (lanes != 0) {
    const int lane = std::countr_zero(lanes);
    lanes &= lanes - 1u;
    const std::int64_t place = counts[lane]++;
    if (place < capacity) lists[lane * capacity + place] = to_float(source[lane]);
  }
}

/// Sweep 2: collects each channel's elements at or beyond its pivots. A full list goes on counting.
template <int kWidth, typename T>
inline void collect_tails(const Tile<T>& tile, const float* top_pivots, const float* bottom_pivots, float* tops,
                          float* bottoms, std::int64_t* num_top, std::int64_t* num_bottom, std::int64_t capacity) {
  F32 top[kWidth];
  F32 bottom[kWidth];
  for (int v = 0; v < kWidth; ++v) {
    top[v] = load(top_pivots + v * kLanes);
    bottom[v] = load(bottom_pivots + v * kLanes);
  }
  const T* row = tile.x;
  for (std::int64_t t = 0; t < tile.tokens; ++t, row += tile.x_stride) {
    for (int v = 0; v < kWidth; ++v) {
      const F32 value = load(row + v * kLanes);
      const Mask above = ge(value, top[v]);
      const Mask below = le(value, bottom[v]);
      if (bits(either(above, below)) == 0) continue;
      const std::int64_t first = v * kLanes;
      append(row + first, bits(above), tops + first * capacity, num_top + first, capacity);
      append(row + first, bits(below), bottoms + first * capacity, num_bottom + first, capacity);
    }
  }
}

/// Thresholds and dense range of one channel whose lists do not decide it.
template <typename T>
inline OutlierSplit split_channel(const Tile<T>& tile, std::int64_t channel, const OutlierPlan& plan) {
  std::vector<float> values(static_cast<std::size_t>(tile.tokens));
  for (std::int64_t t = 0; t < tile.tokens; ++t) {
    values[static_cast<std::size_t>(t)] = to_float(tile.x[t * tile.x_stride + channel]);
  }
  return split_by_selection(values.data(), tile.tokens, plan);
}

/// Outlier thresholds and dense ranges of a tile's channels. Returns false when a value is not finite.
template <int kWidth, typename T>
inline bool split_tile(const Tile<T>& tile, const OutlierPlan& plan, OutlierSplit* splits) {
  constexpr int kChannels = kWidth * kLanes;
  const std::int64_t top_length = upper_tail_length(plan, tile.tokens);
  const std::int64_t bottom_length = lower_tail_length(plan);
  const std::int64_t longest = top_length > bottom_length ? top_length : bottom_length;
  const bool short_tails = tails_are_short(plan, tile.tokens);
  // Twice as many blocks as wanted elements: the pivot is about the median of the blocks' extremes, which leaves about
  // 1.4 times the wanted number beyond it. Room for 4 times; a channel that drifts more takes the slow way.
  const std::int64_t blocks = short_tails ? 2 * longest : 1;
  const std::int64_t capacity = 4 * longest + 32;
  float* lows = thread_scratch(kChannels * (2 * blocks + 2 * capacity + 2) + 2 * blocks);
  float* highs = lows + kChannels * blocks;
  float* tops = highs + kChannels * blocks;
  float* bottoms = tops + kChannels * capacity;
  float* top_pivots = bottoms + kChannels * capacity;
  float* bottom_pivots = top_pivots + kChannels;
  float* column = bottom_pivots + kChannels;
  if (!find_extremes<kWidth>(tile, blocks, lows, highs)) return false;
  if (!short_tails) {
    for (std::int64_t c = 0; c < kChannels; ++c) splits[c] = split_channel(tile, c, plan);
    return true;
  }
  for (std::int64_t c = 0; c < kChannels; ++c) {
    for (std::int64_t b = 0; b < blocks; ++b) column[b] = highs[b * kChannels + c];
    top_pivots[c] = select_largest(column, blocks, top_length);
    for (std::int64_t b = 0; b < blocks; ++b) column[b] = lows[b * kChannels + c];
    bottom_pivots[c] = select_smallest(column, blocks, bottom_length);
  }
  std::int64_t num_top[kChannels] = {};
  std::int64_t num_bottom[kChannels] = {};
  collect_tails<kWidth>(tile, top_pivots, bottom_pivots, tops, bottoms, num_top, num_bottom, capacity);
  for (std::int64_t c = 0; c < kChannels; ++c) {
    const bool fits = num_top[c] <= capacity && num_bottom[c] <= capacity;
    const Tail top{tops + c * capacity, num_top[c]};
    const Tail bottom{bottoms + c * capacity, num_bottom[c]};
    splits[c] = OutlierSplit{};
    if (!fits || !split_from_tails(top, bottom, tile.tokens, plan, splits[c])) {
      splits[c] = split_channel(tile, c, plan);
    }
  }
  return true;
}

/// Sweep 3: quantises, dequantises and writes a tile.
template <Outliers kOutliers, int kWidth, typename T>
inline void write_tile(const Tile<T>& tile, const TileParams<kWidth>& params, const UniformOptions& options) {
  const T* x = tile.x;
  T* out = tile.out;
  if constexpr (std::is_same_v<T, double>) {
    for (std::int64_t t = 0; t < tile.tokens; ++t, x += tile.x_stride, out += tile.out_stride) {
      for (int c = 0; c < kWidth * kLanes; ++c) {
        out[c] = simulate_element<kOutliers>(x[c], UniformGrid{params.qs[c], params.offset[c]}, params.upper[c],
                                             params.lower[c], options);
      }
    }
  } else {
    const F32 levels = set1(largest_code(options.bits));
    const Mask keeps = keeps_degenerate(options);
    for (std::int64_t t = 0; t < tile.tokens; ++t, x += tile.x_stride, out += tile.out_stride) {
      for (int v = 0; v < kWidth; ++v) {
        const int first = v * kLanes;
        store(out + first,
              simulate_lanes<kOutliers>(load(x + first), load(params.qs + first), load(params.offset + first),
                                        load(params.upper + first), load(params.lower + first), levels, keeps));
      }
    }
  }
}

/// All sweeps over one tile. Returns false, and writes nothing, when a value is not finite.
template <Outliers kOutliers, int kWidth, typename T>
bool simulate_tile(const Tile<T>& tile, const UniformOptions& options, UniformCounts& counts) {
  constexpr int kChannels = kWidth * kLanes;
  TileParams<kWidth> params{};
  float low[kChannels];
  float high[kChannels];
  if constexpr (kOutliers == Outliers::kKept) {
    OutlierSplit splits[kChannels];
    const OutlierPlan plan = make_outlier_plan(options.outlier_fraction, tile.tokens);
    if (!split_tile<kWidth>(tile, plan, splits)) return false;
    for (int c = 0; c < kChannels; ++c) {
      low[c] = splits[c].low;
      high[c] = splits[c].high;
      params.upper[c] = splits[c].upper;
      params.lower[c] = splits[c].lower;
      counts.outliers += splits[c].outliers;
    }
  } else if (!find_extremes<kWidth>(tile, 1, low, high)) {
    return false;
  }
  for (int c = 0; c < kChannels; ++c) {
    const UniformGrid grid = make_grid(low[c], high[c], largest_code(options.bits), options.offset, options.compat);
    params.qs[c] = grid.qs;
    params.offset[c] = grid.offset;
  }
  write_tile<kOutliers, kWidth>(tile, params, options);
  counts.vectors += kChannels;
  counts.quantized += kChannels * tile.tokens;
  return true;
}

/// Channels [first, end) of one group of tokens: whole tiles, then single vectors. Returns how many channels it did;
/// the rest do not fill a vector. `all_finite` is cleared, and the tile not written, where a value is not finite.
template <Outliers kOutliers, int kTileVectors, typename T>
std::int64_t simulate_channels(const UniformProblem& problem, TokenRange range, std::int64_t first, std::int64_t end,
                               UniformCounts& counts, bool& all_finite) {
  Tile<T> tile{static_cast<const T*>(problem.x) + range.first * problem.x_token_stride,
               static_cast<T*>(problem.out) + range.first * problem.out_token_stride, problem.x_token_stride,
               problem.out_token_stride, range.end - range.first};
  const T* x = tile.x;
  T* out = tile.out;
  std::int64_t c = first;
  for (; c + kTileVectors * kLanes <= end; c += kTileVectors * kLanes) {
    tile.x = x + c;
    tile.out = out + c;
    all_finite &= simulate_tile<kOutliers, kTileVectors>(tile, problem.options, counts);
  }
  for (; c + kLanes <= end; c += kLanes) {
    tile.x = x + c;
    tile.out = out + c;
    all_finite &= simulate_tile<kOutliers, 1>(tile, problem.options, counts);
  }
  return c - first;
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
