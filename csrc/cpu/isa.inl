// Everything that is compiled once per instruction set. The including file defines FD_ISA, the
// namespace, and is compiled with the flags of that set. No STL in here: the linker could pick an
// inline function of the standard library that was compiled for a newer processor.
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include "kernels.h"

namespace fd {
namespace FD_ISA {

#include "bench.inl"
#include "hint.inl"
#include "kd.inl"
#include "norms.inl"
#include "products.inl"
#include "softmax.inl"

extern const PrivacyKernels privacy_kernels;  // exact.inl
extern const Kernels kernels;
const Kernels kernels = {
    {kd_scratch_bytes, kd_group_rows, kd_forward, kd_scale},
    {softmax_scratch_bytes, softmax_forward, softmax_backward},
    {hint_scratch_bytes, hint_rows},
    &privacy_kernels,
    {product_linear_scratch, product_linear, product_convolution_scratch, product_convolution,
     product_weighted_sum},
    {norm_sums},
    {exp_loop, read_read_write, read_only},
};

}  // namespace FD_ISA
}  // namespace fd
