// What each coded coefficient needs on the GPU, made once per call: where its code lies in a row and in memory, its boundaries.
#pragma once

#include <algorithm>

#include "core/divide_up.h"
#include "cuda/launch.h"
#include "formats/klt_rows/layout.h"
#include "klt/rules.h"

namespace kvpack::cuda {

/// Everything about one coded coefficient, made once per call; the first 16 bytes are what reading its code takes.
struct alignas(16) Coefficient {
  std::int32_t first_centroid;
  std::uint32_t place_inverse;  // of base^digit_place: see inverse_of()
  std::int16_t field_bit;       // of the row where its low bits are; -1: none
  std::int16_t digit_bit;       // of the row where its group of digits is; -1: none
  std::int8_t low_bits;
  std::int8_t digit_section;
  std::int8_t group_bits;
  std::int8_t digit_place;       // in its group
  std::int32_t first_boundary;   // boundary j lies at first_boundary + j * boundary_stride
  std::int16_t boundary_stride;  // coefficients of the same number of levels
  std::int16_t levels;
  std::int16_t field_piece;  // their place among all pieces of a token
  std::int16_t digit_piece;
};

/// A piece of a row that one lane puts together: neighbouring fields of a section, or a group of digits. At most 20 bits:
///   number = piece[first_piece] + multiplier * (piece[first_piece + 1] + multiplier * ...)
struct alignas(8) Unit {
  std::uint16_t first_piece;
  std::uint16_t bit;  // of the row
  std::uint8_t count;
  std::uint8_t multiplier;
  std::uint16_t reserved;
};

/// The same piece as pack_tiles_kernel finds it in a token of a tile.
struct alignas(8) TileUnit {
  std::uint16_t shift;  // bits of the quad before its first piece
  std::uint16_t quad;   // bytes from the token's quads to the first one
  std::uint16_t place;  // bits of the row's word before the unit
  std::uint16_t word;   // bytes from the token's quads to the one that holds the row's word
};

/// Four boundaries: of one place and four coefficients, or a node of a tree.
struct alignas(16) Node {
  float values[4];
};

/// Turns division by 2 to 16807 into a product: number / divisor = floor(number * inverse / 2^31) for numbers below 2^17.
KVPACK_HOST_DEVICE constexpr std::uint32_t inverse_of(std::uint32_t divisor) {
  return (0x80000000u + divisor - 1u) / divisor;
}

/// The inverse of a section's base, without a table in memory.
KVPACK_HOST_DEVICE constexpr std::uint32_t base_inverse(std::int32_t section) {
  constexpr std::uint32_t kOf3 = inverse_of(klt_rows::digit_base(0));
  constexpr std::uint32_t kOf5 = inverse_of(klt_rows::digit_base(1));
  constexpr std::uint32_t kOf7 = inverse_of(klt_rows::digit_base(2));
  return section == 0 ? kOf3 : (section == 1 ? kOf5 : kOf7);
}

/// Fields of a section that a unit takes: at most 20 bits, and the weight of the last one has at most 16.
KVPACK_HOST_DEVICE constexpr std::int32_t unit_fields(std::int32_t section) {
  constexpr std::int32_t kFields[klt_rows::kNumFieldSections] = {4, 8, 8, 3, 4, 4};
  return kFields[section];
}

/// Coefficients go through a tile in fours, quads; those of a quad with as many levels each have their boundaries together:
///   up to 8 levels   node j holds boundary j of all four
///   up to 16         a tree each: boundaries 3, 7, 11, then 0 1 2, 4 5 6, 8 9 10, 12 13 14; missing ones are infinite
///   more             the same with a level more: 15 31 47, then 3 7 11, 19 23 27, ..., then 0 1 2, 4 5 6, ...
KVPACK_HOST_DEVICE constexpr std::int32_t tree_nodes(std::int32_t levels) {
  return levels > 16 ? 1 + 4 + 16 : (levels > 8 ? 1 + 4 : 0);
}
KVPACK_HOST_DEVICE constexpr std::int32_t quad_nodes(std::int32_t levels) {
  return levels > 8 ? 4 * tree_nodes(levels) : levels - 1;
}

/// The whole quads of `count` coefficients from `first` on.
struct QuadRange {
  std::int32_t begin;
  std::int32_t end;
};
KVPACK_HOST_DEVICE constexpr QuadRange whole_quads(std::int32_t first, std::int32_t count) {
  const std::int32_t begin = (first + 3) / 4;
  const std::int32_t end = (first + count) / 4;
  return {begin, end > begin ? end : begin};
}

/// A section's pieces come from three numbers of levels at most, and each may end inside of a unit.
inline constexpr std::int32_t kMostSplitUnits = 3 * (klt_rows::kNumFieldSections + klt_rows::kNumDigitSections);

/// Sizes that follow from a layout.
struct RowPlan {
  klt_rows::RowLayout layout;
  std::int32_t first_field_piece[klt_rows::kNumFieldSections];
  std::int32_t first_digit_piece[klt_rows::kNumDigitSections];
  std::int32_t first_field_unit[klt_rows::kNumFieldSections];
  std::int32_t first_digit_unit[klt_rows::kNumDigitSections];
  std::int32_t pieces;  // bytes of one token: low bits and digits
  std::int32_t units;
  std::int32_t boundaries;         // floats
  std::int32_t centroids;          // floats
  QuadRange quads[kNumKltLevels];  // whole ones
  std::int32_t first_node[kNumKltLevels];
  std::int32_t nodes;
  std::int32_t mixed[kNumKltLevels];  // the other quads
  std::int32_t num_mixed;
  std::int32_t split[kMostSplitUnits];  // units of fewer pieces than others or of coefficients that are no neighbours
  std::int32_t num_split;
};

/// Notes the units inside of which the pieces of a number of levels end.
inline void note_split_units(RowPlan& plan) {
  std::int32_t fields[klt_rows::kNumFieldSections] = {};
  std::int32_t digits[klt_rows::kNumDigitSections] = {};
  const auto note = [&plan](std::int32_t end, std::int32_t pieces, std::int32_t first_unit) {
    if (end % pieces == 0) return;
    const std::int32_t unit = first_unit + end / pieces;
    if (std::find(plan.split, plan.split + plan.num_split, unit) != plan.split + plan.num_split) return;
    plan.split[plan.num_split++] = unit;
  };
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    const klt_rows::LevelParts parts = klt_rows::parts_of(i);
    const std::int32_t count = plan.layout.counts[i];
    if (const std::int32_t s = parts.field_section; count > 0 && s >= 0) {
      note(fields[s] += count, unit_fields(s), plan.first_field_unit[s]);
    }
    if (const std::int32_t s = parts.digit_section; count > 0 && s >= 0) {
      note(digits[s] += count, klt_rows::group_digits(s), plan.first_digit_unit[s]);
    }
  }
}

inline RowPlan plan_rows(const klt_rows::RowLayout& layout) {
  RowPlan plan{};
  plan.layout = layout;
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    plan.first_field_piece[s] = plan.pieces;
    plan.pieces += layout.num_fields[s];
    plan.first_field_unit[s] = plan.units;
    plan.units += static_cast<std::int32_t>(divide_up(layout.num_fields[s], unit_fields(s)));
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    plan.first_digit_piece[s] = plan.pieces;
    plan.pieces += layout.num_digits[s];
    plan.first_digit_unit[s] = plan.units;
    plan.units += static_cast<std::int32_t>(divide_up(layout.num_digits[s], klt_rows::group_digits(s)));
  }
  std::int32_t first = 0;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    plan.boundaries += layout.counts[i] * (kKltLevels[i] - 1);
    plan.centroids += layout.counts[i] * kKltLevels[i];
    plan.first_node[i] = plan.nodes;
    plan.quads[i] = whole_quads(first, layout.counts[i]);
    plan.nodes += (plan.quads[i].end - plan.quads[i].begin) * quad_nodes(kKltLevels[i]);
    first += layout.counts[i];
    const bool is_new = plan.num_mixed == 0 || plan.mixed[plan.num_mixed - 1] != first / 4;
    if (first % 4 != 0 && is_new) plan.mixed[plan.num_mixed++] = first / 4;
  }
  note_split_units(plan);
  return plan;
}

namespace rows {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpLanes;

/// Numbers of levels as constants of the device.
__device__ inline std::int32_t levels_of(std::int32_t index) {
  constexpr std::int32_t kLevels[kNumKltLevels] = {64, 32, 20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2};
  return kLevels[index];
}

/// Unit `index` of a row.
__device__ inline Unit describe_unit(const RowPlan& plan, std::int32_t index) {
  Unit unit{};
  const auto set = [&](std::int32_t piece, std::int32_t bit, std::int32_t count, std::int32_t multiplier) {
    unit.first_piece = static_cast<std::uint16_t>(piece);
    unit.bit = static_cast<std::uint16_t>(bit);
    unit.count = static_cast<std::uint8_t>(count);
    unit.multiplier = static_cast<std::uint8_t>(multiplier);
  };
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    const std::int32_t first = (index - plan.first_field_unit[s]) * unit_fields(s);
    if (first < 0 || first >= plan.layout.num_fields[s]) continue;
    set(plan.first_field_piece[s] + first, plan.layout.first_field_bit[s] + first * klt_rows::field_bits(s),
        min(unit_fields(s), plan.layout.num_fields[s] - first), 1 << klt_rows::field_bits(s));
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    const std::int32_t full = klt_rows::group_digits(s);
    const std::int32_t group = index - plan.first_digit_unit[s];
    if (group < 0 || group * full >= plan.layout.num_digits[s]) continue;
    set(plan.first_digit_piece[s] + group * full,
        plan.layout.first_digit_bit[s] + group * klt_rows::group_bits(s, full),
        min(full, plan.layout.num_digits[s] - group * full), klt_rows::digit_base(s));
  }
  return unit;
}

/// What describe_kernel writes for the packing of tiles.
struct TileTables {
  TileUnit* units;              // [plan.units]
  std::uint16_t* coefficients;  // [plan.pieces] whose pieces they are
  Node* nodes;                  // [plan.nodes]
  std::int32_t quads;           // of a token: a quarter of the pitch
};

/// The coefficient of a field or digit, which is number `place` of its section.
template <typename SectionOf>
__device__ inline std::int32_t coefficient_of(const klt_rows::RowLayout& layout, std::int32_t section,
                                              std::int32_t place, SectionOf section_of) {
  std::int32_t first = 0;
#pragma unroll
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    const std::int32_t count = layout.counts[i];
    if (section_of(klt_rows::parts_of(i)) == section) {
      if (place < count) return first + place;
      place -= count;
    }
    first += count;
  }
  return first;
}

/// The coefficient that a piece is of.
__device__ inline std::int32_t coefficient_of_piece(const RowPlan& plan, std::int32_t piece) {
  for (std::int32_t s = 0; s < klt_rows::kNumFieldSections; ++s) {
    const std::int32_t place = piece - plan.first_field_piece[s];
    if (place < 0 || place >= plan.layout.num_fields[s]) continue;
    return coefficient_of(plan.layout, s, place, [](const klt_rows::LevelParts& parts) { return parts.field_section; });
  }
  for (std::int32_t s = 0; s < klt_rows::kNumDigitSections; ++s) {
    const std::int32_t place = piece - plan.first_digit_piece[s];
    if (place < 0 || place >= plan.layout.num_digits[s]) continue;
    return coefficient_of(plan.layout, s, place, [](const klt_rows::LevelParts& parts) { return parts.digit_section; });
  }
  return 0;
}

/// Unit `index` in a tile. What a split one is taken for goes to the quad behind all numbers, where nobody reads.
__device__ inline TileUnit describe_tile_unit(const RowPlan& plan, const Unit& unit, std::int32_t index,
                                              std::int32_t behind) {
  const std::int32_t k = coefficient_of_piece(plan, unit.first_piece);
  bool is_split = false;
  for (std::int32_t m = 0; m < plan.num_split; ++m) is_split = is_split || plan.split[m] == index;
  TileUnit result{};
  result.shift = static_cast<std::uint16_t>(8 * (k % 4));
  result.quad = static_cast<std::uint16_t>(k / 4 * 16);
  result.place = static_cast<std::uint16_t>(is_split ? 0 : unit.bit % 32);
  result.word = static_cast<std::uint16_t>(16 * (is_split ? behind : unit.bit / 32));
  return result;
}

/// Where boundary j of a member of a quad lies among the nodes of the quad.
__device__ inline float* place_of_boundary(Node* nodes, std::int32_t member, std::int32_t levels, std::int32_t j) {
  if (levels <= 8) return nodes[j].values + member;
  Node* tree = nodes + member * tree_nodes(levels);
  if (levels <= 16) return j % 4 == 3 ? tree->values + j / 4 : tree[1 + j / 4].values + j % 4;
  if (j % 16 == 15) return tree->values + j / 16;
  return j % 4 == 3 ? tree[1 + j / 16].values + j % 16 / 4 : tree[5 + j / 4].values + j % 4;
}

/// Computes the boundaries of a coefficient, `stride` apart, and those of its quad's nodes, null: none.
__device__ inline void place_boundaries(const float* codebook, std::int32_t levels, std::int32_t member,
                                        float* boundaries, std::int32_t stride, Node* nodes) {
  const std::int32_t in_tree = levels <= 8 ? levels - 1 : (levels <= 16 ? 15 : 63);
  const std::int32_t places = nodes == nullptr ? levels - 1 : in_tree;
#pragma unroll 8
  for (std::int32_t j = 0; j < places; ++j) {
    const bool exists = j + 1 < levels;
    // Loads that the compiler need not hold back behind the stores.
    const float boundary = exists ? klt_boundary(__ldg(codebook + j), __ldg(codebook + j + 1)) : INFINITY;
    if (exists) boundaries[j * stride] = boundary;
    if (nodes != nullptr) *place_of_boundary(nodes, member, levels, j) = boundary;
  }
}

/// Describes the coded coefficients and the units of a row, and computes boundaries.
///
/// Launch  a thread per coefficient and per unit, any number of blocks of kThreads
/// Work    walks the classes of the layout up to its coefficient's
/// Reads   centroids once
/// Writes  coefficients, units, boundaries once, and those of tiles
/// Needs   nothing
__global__ void __launch_bounds__(kThreads)
    describe_kernel(RowPlan plan, const float* centroids, Coefficient* coefficients, Unit* units, float* boundaries,
                    TileTables tiles) {
  const auto k = static_cast<std::int32_t>(blockIdx.x * kThreads + threadIdx.x);
  if (k < plan.units) {
    const Unit unit = describe_unit(plan, k);
    units[k] = unit;
    if (tiles.units != nullptr) tiles.units[k] = describe_tile_unit(plan, unit, k, tiles.quads);
  }
  if (k >= plan.layout.coded) return;
  std::int32_t fields[klt_rows::kNumFieldSections] = {};
  std::int32_t digits[klt_rows::kNumDigitSections] = {};
  std::int32_t first = 0;
  std::int32_t first_centroid = 0;
  std::int32_t first_boundary = 0;
  for (std::int32_t i = 0; i < kNumKltLevels; ++i) {
    const std::int32_t count = plan.layout.counts[i];
    const std::int32_t levels = levels_of(i);
    const klt_rows::LevelParts parts = klt_rows::parts_of(i);
    if (k < first + count) {
      const std::int32_t place = k - first;
      Coefficient result{};
      result.first_centroid = first_centroid + place * levels;
      result.first_boundary = first_boundary + place;
      result.boundary_stride = static_cast<std::int16_t>(count);
      result.levels = static_cast<std::int16_t>(levels);
      result.low_bits = static_cast<std::int8_t>(parts.low_bits);
      result.field_bit = result.digit_bit = -1;
      if (parts.field_section >= 0) {
        const std::int32_t field = fields[parts.field_section] + place;
        result.field_piece = static_cast<std::int16_t>(plan.first_field_piece[parts.field_section] + field);
        result.field_bit =
            static_cast<std::int16_t>(plan.layout.first_field_bit[parts.field_section] + field * parts.low_bits);
      }
      if (parts.digit_section >= 0) {
        const std::int32_t s = parts.digit_section;
        const std::int32_t digit = digits[s] + place;
        const std::int32_t full = klt_rows::group_digits(s);
        const std::int32_t group = digit / full;
        result.digit_section = static_cast<std::int8_t>(s);
        result.digit_piece = static_cast<std::int16_t>(plan.first_digit_piece[s] + digit);
        result.digit_place = static_cast<std::int8_t>(digit % full);
        std::uint32_t power = 1;
        for (std::int32_t i = 0; i < digit % full; ++i) power *= static_cast<std::uint32_t>(klt_rows::digit_base(s));
        result.place_inverse = inverse_of(power);
        result.digit_bit =
            static_cast<std::int16_t>(plan.layout.first_digit_bit[s] + group * klt_rows::group_bits(s, full));
        result.group_bits =
            static_cast<std::int8_t>(klt_rows::group_bits(s, min(full, plan.layout.num_digits[s] - group * full)));
      }
      coefficients[k] = result;
      Node* nodes = nullptr;
      if (tiles.units != nullptr) {
        if (parts.field_section >= 0) tiles.coefficients[result.field_piece] = static_cast<std::uint16_t>(k);
        if (parts.digit_section >= 0) tiles.coefficients[result.digit_piece] = static_cast<std::uint16_t>(k);
        const std::int32_t quad = k / 4 - plan.quads[i].begin;
        const bool is_whole = quad >= 0 && k / 4 < plan.quads[i].end;
        if (is_whole) nodes = tiles.nodes + plan.first_node[i] + quad * quad_nodes(levels);
      }
      place_boundaries(centroids + result.first_centroid, levels, k % 4, boundaries + result.first_boundary, count,
                       nodes);
      return;
    }
    first += count;
    first_centroid += count * levels;
    first_boundary += count * (levels - 1);
    if (parts.field_section >= 0) fields[parts.field_section] += count;
    if (parts.digit_section >= 0) digits[parts.digit_section] += count;
  }
}

}  // namespace rows

}  // namespace kvpack::cuda
