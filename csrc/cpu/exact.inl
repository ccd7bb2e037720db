// The kernels whose bits are specified, once per instruction set. Compiled like isa.inl, but
// without contraction of a product and a sum into one rounding (setup.py): so in files of their
// own.
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include "kernels.h"

namespace fd {
namespace FD_ISA {

#include "privacy.inl"
#include "softmax_sum.inl"

extern const PrivacyKernels privacy_kernels;
const PrivacyKernels privacy_kernels = {privacy_square, privacy_add, privacy_add_softmax,
                                        privacy_release, privacy_words};

}  // namespace FD_ISA
}  // namespace fd
