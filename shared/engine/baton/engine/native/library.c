/* What this library is, and whether the CPU can run it. */

#include <stdint.h>

/* A checksum of the sources, from the compiler's command line. */
uint32_t baton_version(void) { return VERSION; }

int baton_is_supported(void) {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}
