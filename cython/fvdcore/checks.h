/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FVD_CHECKS_H
#define FVD_CHECKS_H
#include <stdio.h>
#include <stdlib.h>

/* A broken invariant of the program (never of an image) ends the process: continuing on
 * corrupt memory would put corrupt memory on the disk. The live state lets a successor go on. */
#define FVD_INVARIANT(c)                                                                     \
    do {                                                                                     \
        if (__builtin_expect(!(c), 0)) {                                                     \
            fprintf(stderr, "fvd: invariant broken: %s at %s:%d\n", #c, __FILE__, __LINE__); \
            abort();                                                                         \
        }                                                                                    \
    } while (0)

#endif
