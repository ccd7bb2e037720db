// Rows of few classes, kLanes of them at once with a row to a lane: their transpose, and back.
// Included once per instruction set, inside that set's namespace.
#pragma once
#include "transpose.inl"

// Where the next kLanes columns of a tile begin: the last ones overlap those before.
FD_INLINE int64_t next_columns(int64_t first, int64_t cols) {
  return first + kLanes < cols && first + 2 * kLanes > cols ? cols - kLanes : first + kLanes;
}

// x[i * kLanes + r] = element i of row r, for i < cols; with TOP the largest of each row.
template <bool TOP>
static Lanes<float> load_tile(Type type, const char* const* rows, int64_t cols, float* x) {
  alignas(64) float wide[kLanes][kLanes], beyond[kLanes];
  Lanes<float> top;
  top.fill(-__builtin_inff());
  for (auto& row : wide)
    for (float& v : row) v = -__builtin_inff();  // beyond the last class; not a maximum
  const float* from[kLanes];
  float* to[kLanes];
  const int64_t width = cols < kLanes ? cols : kLanes;
  for (int64_t first = 0; first < cols; first = next_columns(first, cols)) {
    for (int r = 0; r < kLanes; r++) {
      from[r] = wide[r];
      if (type == Type::f32) {
        const float* row = reinterpret_cast<const float*>(rows[r]) + first;
        if (width == kLanes) {
          from[r] = row;
        } else {
          for (int64_t i = 0; i < width; i++) wide[r][i] = row[i];
        }
      } else if (width == kLanes) {
        widen(type, reinterpret_cast<const uint16_t*>(rows[r]) + first, wide[r]);
      } else {
        for (int64_t i = 0; i < width; i++) wide[r][i] = element<float>(type, rows[r], i);
      }
    }
    for (int i = 0; i < kLanes; i++) to[i] = i < width ? x + (first + i) * kLanes : beyond;
    transpose<TOP>(from, to, top.at);
  }
  return top;
}

// Element i of row r = x[i * kLanes + r], for i < cols and r < count, rounded to nearest.
static void store_tile(Type type, char* const* rows, int count, int64_t cols, const float* x) {
  alignas(64) float wide[kLanes][kLanes];
  const float* from[kLanes];
  float* to[kLanes];
  const int64_t width = cols < kLanes ? cols : kLanes;
  const bool direct = type == Type::f32 && width == kLanes;
  for (int64_t first = 0; first < cols; first = next_columns(first, cols)) {
    for (int i = 0; i < kLanes; i++) {
      from[i] = x + (i < width ? first + i : first) * kLanes;
      to[i] = direct && i < count ? reinterpret_cast<float*>(rows[i]) + first : wide[i];
    }
    transpose(from, to);
    if (direct) continue;
    for (int r = 0; r < count; r++) {
      char* row = rows[r] + first * size_of(type);
      uint16_t narrow[kLanes];
      if (type == Type::f32) {
        __builtin_memcpy(row, wide[r], static_cast<size_t>(width) * sizeof(float));
        continue;
      }
      if (type == Type::bf16) {
        narrow_bf16(wide[r], narrow);
      } else {
        narrow_f16(wide[r], narrow);
      }
      if (width == kLanes) {
        __builtin_memcpy(row, narrow, sizeof narrow);
      } else {
        __builtin_memcpy(row, narrow, static_cast<size_t>(width) * sizeof *narrow);
      }
    }
  }
}
