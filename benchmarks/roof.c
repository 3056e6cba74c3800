/* What one core can reach at most: multiply-adds on registers alone, and a walk through memory that only reads.
 * Compiled and called by floor.py, one call a thread. Twelve independent accumulators hide the latency of the FMA units (4 to 5 cycles, two a cycle). */
#include <stddef.h>

typedef float vec8 __attribute__((vector_size(32)));
typedef float vec16 __attribute__((vector_size(64)));

#define LOOP(V, WIDTH)                                                                       \
    V a[12], x, y;                                                                           \
    for (int j = 0; j < WIDTH; j++) { x[j] = 0.999f; y[j] = 0.001f; }                        \
    for (int i = 0; i < 12; i++) a[i] = y * (float)(i + 1);                                  \
    for (size_t n = 0; n < count; n++) {                                                     \
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) a[i] = a[i] * x + y;           \
    }                                                                                        \
    float sum = 0;                                                                           \
    for (int i = 0; i < 12; i++) for (int j = 0; j < WIDTH; j++) sum += a[i][j];             \
    *sink = sum;                                                                             \
    return 2.0 * 12 * WIDTH * (double)count;

__attribute__((target("avx2,fma"))) static double run8(size_t count, float *sink) { LOOP(vec8, 8) }
__attribute__((target("avx512f"))) static double run16(size_t count, float *sink) { LOOP(vec16, 16) }

/* Operations done (a multiply-add is two), or 0 where neither instruction set is there. */
double fma_run(size_t count, float *sink) {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return run16(count, sink);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run8(count, sink);
    return 0;
}

/* Reads `count` floats (a multiple of 64) and does next to nothing with them; returns the bytes read. */
__attribute__((target("avx2"))) double read_run(const float *data, size_t count, float *sink) {
    vec8 a[8] = {0};
    for (size_t n = 0; n + 64 <= count; n += 64)
        _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++) {
            vec8 x;
            __builtin_memcpy(&x, data + n + 8 * i, sizeof x);
            a[i] += x;
        }
    float sum = 0;
    for (int i = 0; i < 8; i++) for (int j = 0; j < 8; j++) sum += a[i][j];
    *sink = sum;
    return (double)count * sizeof(float);
}
