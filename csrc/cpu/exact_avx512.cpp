// Compiled with the flags of this instruction set (setup.py).
#define FD_ISA avx512
#include "exact.inl"
