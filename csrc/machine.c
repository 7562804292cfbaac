/* The CPU's instruction set. */
#include "p2l_native.h"

int p2l_isa_level(void) {
#ifdef P2L_LEVELS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("x86-64-v4")) return __builtin_cpu_supports("avx512bf16") ? 5 : 4;
    if (__builtin_cpu_supports("x86-64-v3")) return 3;
    return 2;
#else
    return 0;
#endif
}
