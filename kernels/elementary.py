"""e^x, log, sigmoid, tanh and its slope for Triton kernels, float32 to about one rounding, float64 as Triton has them.

`tl.exp` is the hardware's 2^x of a rounded x * log2(e): its relative error grows with |x|, to a hundred roundings where
softmax has its smallest terms. `tl.log` has an absolute error that eager code's has not near 1, and `/` is no IEEE
division. Eager kernels have none of this, so a fused kernel needs better functions not to be the less accurate one.

Source of the polynomials: Moshier's Cephes library, expf and logf; of tanh below 1: Lambert's continued fraction.
"""

from fxopt.kernels.backend import tl, triton


@triton.jit
def exp(x):
    """e^x. x = n * log(2) + r with log(2) in two parts, so that n times the first is exact; 2^n is set bit by bit."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        bounded = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))  # e^-104 is 0 and e^89 infinite
        n = tl.floor(bounded * 1.4426950408889634 + 0.5)
        r = (bounded - n * 0.693359375) + n * 2.12194440e-4
        p = 1.3981999507e-3 + r * 1.9875691500e-4
        p = 4.1665795894e-2 + r * (8.3334519073e-3 + r * p)
        p = 5.0000001201e-1 + r * (1.6666665459e-1 + r * p)
        p = 1.0 + (r + r * r * p)
        whole = n.to(tl.int32)
        half = whole >> 1  # 2^n in two steps: 2^128 and 2^-150 are no float32
        y = p * _power_of_2(half) * _power_of_2(whole - half)
        y = tl.where(x == x, y, x)
    return y


@triton.jit
def _power_of_2(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log(x):
    """The natural logarithm, of normal numbers; of others as `tl.log`."""
    if x.dtype == tl.float64:
        y = tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        e = ((bits >> 23) - 126).to(tl.float32)
        m = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)  # in [1/2, 1)
        small = m < 0.70710678118654752
        e = tl.where(small, e - 1.0, e)
        m = tl.where(small, m + m, m) - 1.0
        p = -1.1514610310e-1 + m * 7.0376836292e-2
        p = -1.2420140846e-1 + m * (1.1676998740e-1 + m * p)
        p = -1.6668057665e-1 + m * (1.4249322787e-1 + m * p)
        p = -2.4999993993e-1 + m * (2.0000714765e-1 + m * p)
        p = 3.3333331174e-1 + m * p
        p = m * m * m * p - e * 2.12194440e-4
        y = (m + (p - 0.5 * m * m)) + e * 0.693359375
        y = tl.where((x > 1.1754943508222875e-38) & (x < float("inf")), y, tl.log(x))
    return y


@triton.jit
def divide(x, y):
    """x / y, rounded to nearest."""
    return x / y if y.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x). As sigmoid(-x), 1 - sigmoid(x) keeps its digits where x is large."""
    return divide(1.0, 1.0 + exp(-x))


@triton.jit
def tanh(x):
    """Below 1 Lambert's continued fraction, as x minus a small part, with an error of 4e-17 x^19; beyond it the
    exponential, in which a small x would lose its digits."""
    x2 = x * x
    part = x2 * (11486475.0 + x2 * (810810.0 + x2 * (12870.0 + x2 * 44.0)))
    part = divide(part, 34459425.0 + x2 * (16216200.0 + x2 * (945945.0 + x2 * (13860.0 + x2 * 45.0))))
    beyond = 1.0 - divide(2.0, 1.0 + exp(2.0 * tl.abs(x)))
    return tl.where(x2 < 1.0, x - x * part, tl.where(x < 0.0, -beyond, beyond))


@triton.jit
def tanh_slope(x):
    """1 - tanh(x)², without the difference: where x is large, it would be that of roundings alone."""
    e = exp(-2.0 * tl.abs(x))
    return divide(4.0 * e, (1.0 + e) * (1.0 + e))
