/* CLONES before a function has GCC compile it twice, for AVX2 with FMA and for any x86-64, and pick one when the
 * library is loaded. Other compilers, processors and C libraries compile it once. */
#include <stdint.h> /* defines __GLIBC__, where the loader can pick */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* For the helpers of such functions: they must become part of each clone. */
#define INLINE static inline __attribute__((always_inline))
