// Compiled with the flags of this instruction set (setup.py).
#define FD_ISA baseline
#include "isa.inl"
