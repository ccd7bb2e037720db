// One value for each of kLanes lanes, or one for all of them.
// Included once per instruction set, inside that set's namespace.
#pragma once
#include "rows.inl"

template <class R>
FD_INLINE R larger(R x, R m) {
  return x > m ? x : m;  // a NaN is caught by the sum of the exponentials
}

// The sums and maxima of a loop, or a constant that differs from lane to lane. The loops of the
// kernels run over whole chunks of kLanes classes, an inner `omp simd` loop each; a scalar
// reduction would end in kLanes dependent additions per row.
template <class R>
struct Lanes {
  alignas(64) R at[kLanes];

  FD_INLINE_MEMBER R operator[](int j) const { return at[j]; }
  FD_INLINE_MEMBER void put(int j, R x) { at[j] = x; }
  FD_INLINE_MEMBER void fill(R x) {
    for (int j = 0; j < kLanes; j++) at[j] = x;
  }
  FD_INLINE_MEMBER R sum() const { return folded<true>(); }
  FD_INLINE_MEMBER R maximum() const { return folded<false>(); }

 private:
  template <int N>
  struct Vector {
    typedef R Type __attribute__((vector_size(N * sizeof(R)), may_alias));
  };

  // Halves with halves, in vector registers.
  template <bool ADD>
  FD_INLINE_MEMBER R folded() const {
    alignas(64) R x[kLanes];
    __builtin_memcpy(x, at, sizeof x);
    fold<ADD, kLanes / 2>(x);
    return x[0];
  }
  template <bool ADD, int N>
  FD_INLINE_MEMBER static void fold(R* x) {
    if constexpr (N >= 2) {
      typedef typename Vector<N>::Type V;
      V low, high;
      __builtin_memcpy(&low, x, sizeof low);
      __builtin_memcpy(&high, x + N, sizeof high);
      if constexpr (ADD) {
        low += high;
      } else {
        low = low > high ? low : high;
      }
      __builtin_memcpy(x, &low, sizeof low);
      fold<ADD, N / 2>(x);
    } else {
      x[0] = ADD ? x[0] + x[1] : larger(x[0], x[1]);
    }
  }
};

// A constant that is the same in all lanes.
template <class R>
struct Same {
  R value;

  FD_INLINE_MEMBER R operator[](int) const { return value; }
  FD_INLINE_MEMBER void put(int, R x) { value = x; }
};

// What is fetched while something else is computed.
struct Ahead {
  const char* data;
  int64_t bytes;  // of an element

  FD_INLINE_MEMBER Ahead operator+(int64_t elements) const {
    return {data + elements * bytes, bytes};
  }
};
