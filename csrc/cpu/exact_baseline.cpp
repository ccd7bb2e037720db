// Compiled with the flags of this instruction set (setup.py).
#define FD_ISA baseline
#include "exact.inl"
