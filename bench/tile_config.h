// Included before everything else (-include) when llama.cpp is built for `make bench`: GCC before 13.3 says of
// _tile_loadconfig that it reads 8 of its 64 bytes, so the stores to the others are dropped, and a llama.cpp built by it
// crashes on processors with AMX (its pull request 26954). No other compiler or processor sees a difference.
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
