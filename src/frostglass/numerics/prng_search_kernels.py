"""The Mersenne Twister of numpy and torch, from a seed to a verdict, in loops that numba compiles.

Each function is self-contained, because a compiled function cannot call an uncompiled one.
"""

from __future__ import annotations

import numpy as np


def scan_numpy(  # type: ignore[no-untyped-def]
    start, stop, k, private, c1, c2, rows, whole, kinds, parts, mass, code, tolerance, found
):
    """found[0] = first seed whose |N(0, 1)| rows, drawn as numpy's RandomState does, agree with all clues.

    MT19937 (Matsumoto and Nishimura 1998) with Knuth's initialisation; normals by the polar method, the second of each
    pair kept for the next call. One function, because a compiled one cannot call an uncompiled one.
    """
    state = np.empty(624, np.uint32)
    row, half = np.empty(k, np.float64), np.empty(private, np.float64)
    refused = np.empty(rows, np.int64)
    for seed in range(start, stop):
        word = np.uint32(seed)
        state[0] = word
        for i in range(1, 624):
            word = np.uint32(np.uint32(1812433253) * (word ^ (word >> np.uint32(30))) + np.uint32(i))
            state[i] = word
        at, kept, held = 0, False, 0.0
        good, turn, waiting, served = True, 0, 0, 0
        while True:
            again = turn >= rows  # rows that the law refused are drawn again, one by one, after all of the round
            if not again:
                r = turn
                turn += 1
            elif whole and served < waiting:
                r = refused[served]
            else:
                break
            for j in range(k):
                if kept:
                    row[j] = abs(held)
                    kept = False
                    continue
                while True:
                    x1, x2 = 0.0, 0.0
                    for which in range(2):
                        a = np.uint64(0)
                        b = np.uint64(0)
                        for part in range(2):
                            # the twist of word `at`, in place: words 0 .. at - 1 belong to the next block already
                            p = at % 624
                            y = (state[p] & np.uint32(0x80000000)) | (state[(p + 1) % 624] & np.uint32(0x7FFFFFFF))
                            z = state[(p + 397) % 624] ^ (y >> np.uint32(1))
                            if y & np.uint32(1):
                                z = z ^ np.uint32(0x9908B0DF)
                            state[p] = z
                            at += 1
                            z = z ^ (z >> np.uint32(11))
                            z = z ^ ((z << np.uint32(7)) & np.uint32(0x9D2C5680))
                            z = z ^ ((z << np.uint32(15)) & np.uint32(0xEFC60000))
                            z = z ^ (z >> np.uint32(18))
                            if part == 0:
                                a = np.uint64(z >> np.uint32(5))
                            else:
                                b = np.uint64(z >> np.uint32(6))
                        u = (float(a) * 67108864.0 + float(b)) / 9007199254740992.0
                        if which == 0:
                            x1 = 2.0 * u - 1.0
                        else:
                            x2 = 2.0 * u - 1.0
                    r2 = x1 * x1 + x2 * x2
                    if 0.0 < r2 < 1.0:
                        break
                f = np.sqrt(-2.0 * np.log(r2) / r2)
                held, kept = f * x1, True
                row[j] = abs(f * x2)
            total, most, share = 0.0, 0.0, 0.0
            for j in range(k):
                total += row[j]
            for j in range(k):
                row[j] /= total
                if row[j] > most:
                    most = row[j]
            for j in range(private):
                share += row[j]
            if np.float32(most) > c1 or (c2 >= 0.0 and share < c2):
                if not again:
                    refused[waiting] = r
                    waiting += 1
                continue
            if again:
                served += 1
            if kinds[r] == 0:
                continue
            sum_ = share
            for j in range(private):
                half[j] = row[j]
            if code == 1:  # quarters by largest remainder
                sum_ = np.floor(share * 4.0 + 0.5) / 4.0
                spare = int(np.floor(share * 4.0 + 0.5))
                for j in range(private):
                    spare -= int(np.floor(half[j] * 4.0))
                for _ in range(spare):
                    best, gap = 0, -1.0
                    for j in range(private):
                        rest = row[j] * 4.0 - np.floor(row[j] * 4.0)
                        if rest > gap and half[j] >= 0.0:
                            best, gap = j, rest
                    half[best] = -(np.floor(row[best] * 4.0) + 1.0) / 4.0 - 1.0  # marked as raised
                for j in range(private):
                    if half[j] < 0.0:
                        half[j] = -half[j] - 1.0
                    else:
                        half[j] = np.floor(half[j] * 4.0) / 4.0
            elif code == 2:
                for j in range(private):
                    half[j] /= share
            if kinds[r] == 2:
                if abs(sum_ - mass[r]) > tolerance:
                    good = False
                    break
                continue
            for i in range(1, private):  # insertion sort, descending
                value, j = half[i], i - 1
                while j >= 0 and half[j] < value:
                    half[j + 1] = half[j]
                    j -= 1
                half[j + 1] = value
            for j in range(private):
                if abs(half[j] - parts[r, j]) > tolerance:
                    good = False
                    break
            if not good:
                break
        if good:
            found[0] = seed
            return


def scan_torch(start, stop, first, second, rows, found):  # type: ignore[no-untyped-def]
    """found[0] = first seed whose torch.randperm(n) p has first[p[i]] == second[i] for all rows i, where known."""
    n = len(first)
    state = np.empty(624, np.uint32)
    order = np.arange(n)
    touched = np.empty(2 * rows, np.int64)
    for seed in range(start, stop):
        word = np.uint32(seed)
        state[0] = word
        for i in range(1, 624):
            word = np.uint32(np.uint32(1812433253) * (word ^ (word >> np.uint32(30))) + np.uint32(i))
            state[i] = word
        good, used = True, 0
        for i in range(rows):
            p = i % 624
            y = (state[p] & np.uint32(0x80000000)) | (state[(p + 1) % 624] & np.uint32(0x7FFFFFFF))
            z = state[(p + 397) % 624] ^ (y >> np.uint32(1))
            if y & np.uint32(1):
                z = z ^ np.uint32(0x9908B0DF)
            state[p] = z
            z = z ^ (z >> np.uint32(11))
            z = z ^ ((z << np.uint32(7)) & np.uint32(0x9D2C5680))
            z = z ^ ((z << np.uint32(15)) & np.uint32(0xEFC60000))
            z = z ^ (z >> np.uint32(18))
            other = i + int(z) % (n - i)
            kept = order[i]
            order[i] = order[other]
            order[other] = kept
            touched[used] = i
            touched[used + 1] = other
            used += 2
            mine, wanted = first[order[i]], second[i]
            if mine >= 0 and wanted >= 0 and mine != wanted:
                good = False
                break
        for i in range(used):
            order[touched[i]] = touched[i]
        if good:
            found[0] = seed
            return
