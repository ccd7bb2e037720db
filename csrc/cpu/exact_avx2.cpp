// Compiled with the flags of this instruction set (setup.py).
#define FD_ISA avx2
#include "exact.inl"
