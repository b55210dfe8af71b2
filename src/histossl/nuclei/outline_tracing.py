"""Traces the outlines of labelled nuclei at finer than pixels: compiled loops.

This module does not import torch: worker processes use it.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Directions right, down, left, up: steps of a walk along the edges between pixels, with the nucleus on the right.
_DR = np.array([0, 1, 0, -1])
_DC = np.array([1, 0, -1, 0])
# The pixel to the right of the edge ahead of a corner; the one to the left is that of the direction before.
_RIGHT_R = np.array([0, 0, -1, -1])
_RIGHT_C = np.array([0, -1, -1, 0])


@njit(cache=True)
def _first_pixels(labels, count):
    first = np.full((count + 1, 2), -1, np.int64)
    for r in range(labels.shape[0]):
        for c in range(labels.shape[1]):
            k = labels[r, c]
            if k > 0 and first[k, 0] < 0:
                first[k, 0], first[k, 1] = r, c
    return first


@njit(cache=True)
def _walk(labels, k, r, c, confidence, threshold, points, at):
    """Walk once around nucleus k from the top left corner of its first pixel (r, c); returns the number of edges.

    With `at` >= 0 the point of every edge is written to points[at:].
    """
    heading, steps = 0, 0
    corner_r, corner_c = r, c
    while True:
        # The pixels to the right and to the left of the edge ahead.
        ir, ic = corner_r + _RIGHT_R[heading], corner_c + _RIGHT_C[heading]
        jr, jc = corner_r + _RIGHT_R[heading - 1], corner_c + _RIGHT_C[heading - 1]
        if at >= 0:
            inner, outer = confidence[ir, ic], confidence[jr, jc]
            part = 0.5
            if labels[jr, jc] == 0 and inner > threshold > outer:
                part = np.rint(min(0.95, max(0.05, (inner - threshold) / (inner - outer))) * 64) / 64
            # The labels are padded by one pixel: a pixel's centre is at its index minus a half.
            points[at + steps, 0] = ic + (jc - ic) * part - 0.5
            points[at + steps, 1] = ir + (jr - ir) * part - 0.5
        steps += 1
        corner_r += _DR[heading]
        corner_c += _DC[heading]
        # Pixels ahead of the corner, right and left: turn right if the right one is outside, left if both are inside.
        ar, ac = corner_r + _RIGHT_R[heading], corner_c + _RIGHT_C[heading]
        br, bc = corner_r + _RIGHT_R[heading - 1], corner_c + _RIGHT_C[heading - 1]
        if labels[ar, ac] != k:
            heading = (heading + 1) % 4
        elif labels[br, bc] == k:
            heading = (heading + 3) % 4
        if corner_r == r and corner_c == c and heading == 0:
            return steps


@njit(cache=True)
def _outline_steps(labels, count):
    first = _first_pixels(labels, count)
    steps = np.zeros(count, np.int64)
    nothing, blank = np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32)
    for k in range(1, count + 1):
        steps[k - 1] = _walk(labels, k, first[k, 0], first[k, 1], blank, np.float32(0), nothing, -1)
    return steps


@njit(cache=True)
def _trace(labels, confidence, threshold, start, points):
    first = _first_pixels(labels, len(start))
    for k in range(1, len(start) + 1):
        _walk(labels, k, first[k, 0], first[k, 1], confidence, threshold, points, start[k - 1])


def trace_outlines(
    labels: NDArray[np.int32], confidence: NDArray[np.float32], threshold: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Trace the outline of every nucleus; holes are not traced.

    Args:
        labels: (H, W) int32, 1..n, each 4-connected.
        confidence: (H, W) float32 in [0, 1].
        threshold: threshold on the confidence, 0 to 1, which outlines follow where they border on background.

    Returns:
        (P, 2) float32, the outlines one after another, (x, y) in pixels of the labels, not closed; and (n + 1,) int64,
        where each outline begins.
    """
    padded = np.pad(labels, 1)
    # The first walk counts the edges of each nucleus, so that the second writes into one array.
    steps = _outline_steps(padded, int(labels.max(initial=0)))
    start = np.concatenate([[0], np.cumsum(steps)])
    points = np.empty((start[-1], 2), np.float32)
    _trace(padded, np.pad(confidence, 1), np.float32(threshold), start[:-1].copy(), points)
    return points, start
