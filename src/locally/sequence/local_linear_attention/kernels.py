# mypy: disable-error-code="no-untyped-def"
"""FlashLLA on the device: nothing of size L x S is stored, every pass over the keys computes the weights anew.

One program holds a block of queries and runs conjugate gradients for all its rows at once; a second kernel does the
same for the gradients to queries, a third takes a block of keys and gathers the gradients to keys and values. Float32
throughout; `launch` prepares what they read. Source: arXiv 2510.01450, the blockwise algorithm.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, count, width, BLOCK: tl.constexpr):
    """Rows of a contiguous (count, width) matrix, zeros outside it."""
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    return tl.load(base + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(base, x, rows, count, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    tl.store(base + rows[:, None] * width + columns[None, :], x, mask=inside)


@triton.jit
def masked_logits(
    q, k, scale, rows, keys, L, S, reach, hidden, CAUSAL: tl.constexpr, MASKED: tl.constexpr, IN: tl.constexpr
):
    logits = tl.dot(q, tl.trans(k), input_precision=IN) * scale[:, None]
    seen = (keys[None, :] < S) & (rows[:, None] < L)
    if CAUSAL:
        seen = seen & (keys[None, :] < reach + rows[:, None])
    if MASKED:
        seen = seen & (tl.load(hidden + keys, mask=keys < S, other=1) == 0)[None, :]
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def apply(
    p, q, offset, scale, shift, mu, loading, K, rows, end, L, S, reach, hidden, d,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """A_i p_i, one pass over the keys that the block sees."""
    y = tl.zeros([BR, D], tl.float32)
    along_offset = tl.sum(p * offset, 1)
    for start in range(0, end, BC):
        keys = start + tl.arange(0, BC)
        k = load_rows(K, keys, S, d, D)
        w = tl.exp(masked_logits(q, k, scale, rows, keys, L, S, reach, hidden, CAUSAL, MASKED, IN) - shift[:, None])
        u = (tl.dot(p, tl.trans(k), input_precision=IN) - along_offset[:, None]) * w
        y += tl.dot(u, k, input_precision=IN)
    return y - tl.sum(mu * p, 1)[:, None] * offset + loading[:, None] * p


@triton.jit
def conjugate_gradients(
    b, inverse, tol2, max_iter, q, offset, scale, shift, mu, loading, K, rows, end, L, S, reach, hidden, d,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """Rows side by side; a row that has converged takes no steps, and the block stops when none is active."""
    x = tl.zeros([BR, D], tl.float32)
    r = b
    p = r * inverse
    g = tl.sum(r * p, 1)
    target = tol2 * g
    active = g > 0
    steps = 0
    while (steps < max_iter) & (tl.max(active.to(tl.int32), 0) > 0):
        y = apply(
            p, q, offset, scale, shift, mu, loading, K, rows, end, L, S, reach, hidden, d,
            CAUSAL, MASKED, BR, BC, D, IN,
        )  # fmt: skip
        curvature = tl.sum(p * y, 1)
        active = active & (curvature > 0)
        alpha = tl.where(active, g / tl.where(active, curvature, 1.0), 0.0)
        x += alpha[:, None] * p
        r -= alpha[:, None] * y
        z = r * inverse
        g_next = tl.sum(r * z, 1)
        active = active & (g_next > target)
        beta = tl.where(active, g_next / tl.where(active, g, 1.0), 0.0)
        p = z + beta[:, None] * p
        g = g_next
        steps += 1
    return x, steps, (g > target) | (g != g)


@triton.jit
def forward_kernel(
    Q, OFFSET, K, V, SCALE, RIDGE, HIDDEN, O, RHO, DELTA, OMEGA, SHIFT, STEPS, UNCONVERGED,
    L, S, reach, group, d, dv, tol2, max_iter, epsilon,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, JACOBI: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * BR + tl.arange(0, BR)
    end = S
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(S, reach + block * BR + BR - 1))
    K += head // group * S * d
    V += head // group * S * dv
    HIDDEN += head // group * S
    q, offset = load_rows(Q + head * L * d, rows, L, d, D), load_rows(OFFSET + head * L * d, rows, L, d, D)
    scale = tl.load(SCALE + head * L + rows, mask=rows < L, other=1.0)
    ridge = tl.load(RIDGE + head * L + rows, mask=rows < L, other=1.0)

    # first pass: the largest logit so far, and moments rescaled whenever it grows
    shift = tl.full([BR], float("-inf"), tl.float32)
    omega = tl.zeros([BR], tl.float32)
    first = tl.zeros([BR, D], tl.float32)
    second = tl.zeros([BR, D], tl.float32)
    for start in range(0, end, BC):
        keys = start + tl.arange(0, BC)
        k = load_rows(K, keys, S, d, D)
        logits = masked_logits(q, k, scale, rows, keys, L, S, reach, HIDDEN, CAUSAL, MASKED, IN)
        larger = tl.maximum(shift, tl.max(logits, 1))
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        w = tl.exp(logits - safe[:, None])
        rescale = tl.exp(shift - safe)
        omega = omega * rescale + tl.sum(w, 1)
        first = first * rescale[:, None] + tl.dot(w, k, input_precision=IN)
        if JACOBI:
            second = second * rescale[:, None] + tl.dot(w, k * k, input_precision=IN)
        shift = larger
    shift = tl.where(shift == float("-inf"), 0.0, shift)

    mu = first - omega[:, None] * offset
    loading = tl.where(omega > 0, ridge * omega, 1.0)
    inverse = tl.full([BR, D], 1.0, tl.float32)
    if JACOBI:
        about = second - offset * (2 * mu + omega[:, None] * offset)
        inverse = 1 / (tl.maximum(about, 0.0) + loading[:, None])
    rho, steps, unconverged = conjugate_gradients(
        mu, inverse, tol2, max_iter, q, offset, scale, shift, mu, loading, K, rows, end, L, S, reach, HIDDEN, d,
        CAUSAL, MASKED, BR, BC, D, IN,
    )  # fmt: skip

    # last pass: numerators w (1 - z . rho), whose sum is the denominator
    output = tl.zeros([BR, DV], tl.float32)
    delta = tl.zeros([BR], tl.float32)
    along_offset = tl.sum(rho * offset, 1)
    for start in range(0, end, BC):
        keys = start + tl.arange(0, BC)
        k = load_rows(K, keys, S, d, D)
        w = tl.exp(masked_logits(q, k, scale, rows, keys, L, S, reach, HIDDEN, CAUSAL, MASKED, IN) - shift[:, None])
        rho_z = tl.dot(rho, tl.trans(k), input_precision=IN) - along_offset[:, None]
        numerators = w * (1 - rho_z)
        delta += tl.sum(numerators, 1)
        output += tl.dot(numerators, load_rows(V, keys, S, dv, DV), input_precision=IN)
    delta = tl.where(omega > 0, delta, 1.0)
    delta += tl.where(delta < 0, -epsilon, epsilon)
    store_rows(O + head * L * dv, output / delta[:, None], rows, L, dv, DV)
    store_rows(RHO + head * L * d, rho, rows, L, d, D)
    tl.store(DELTA + head * L + rows, delta, mask=rows < L)
    tl.store(OMEGA + head * L + rows, omega, mask=rows < L)
    tl.store(SHIFT + head * L + rows, shift, mask=rows < L)
    tl.store(STEPS + head * tl.num_programs(0) + block, steps)
    tl.store(UNCONVERGED + head * L + rows, unconverged.to(tl.int32), mask=rows < L)


@triton.jit
def pair_gradients(w, G, rho_z, a_z, beta, along_rho, EXACT: tl.constexpr):
    """Gradient to the logits, and what reaches z through rho and through a."""
    inner = (G - beta[:, None] + a_z) * (1 - rho_z)
    if EXACT:
        inner -= along_rho[:, None]  # ridge_i a_i . rho_i
    return w * inner, w * (G + a_z), w * rho_z


@triton.jit
def query_kernel(
    Q, OFFSET, K, V, SCALE, RIDGE, HIDDEN, RHO, DELTA, OMEGA, SHIFT, DO,
    DQ, DSCALE, DRIDGE, ROWSUM, A, BETA, STEPS, UNCONVERGED,
    L, S, reach, group, d, dv, tol2, max_iter,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, JACOBI: tl.constexpr, EXACT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """The second solve of a block of queries, and every gradient that a query owns."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * BR + tl.arange(0, BR)
    end = S
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(S, reach + block * BR + BR - 1))
    K += head // group * S * d
    V += head // group * S * dv
    HIDDEN += head // group * S
    q, offset = load_rows(Q + head * L * d, rows, L, d, D), load_rows(OFFSET + head * L * d, rows, L, d, D)
    rho, do = load_rows(RHO + head * L * d, rows, L, d, D), load_rows(DO + head * L * dv, rows, L, dv, DV)
    scale = tl.load(SCALE + head * L + rows, mask=rows < L, other=1.0)
    ridge = tl.load(RIDGE + head * L + rows, mask=rows < L, other=1.0)
    delta = tl.load(DELTA + head * L + rows, mask=rows < L, other=1.0)
    omega = tl.load(OMEGA + head * L + rows, mask=rows < L, other=0.0)
    shift = tl.load(SHIFT + head * L + rows, mask=rows < L, other=0.0)
    rho_offset = tl.sum(rho * offset, 1)

    first = tl.zeros([BR, D], tl.float32)
    second = tl.zeros([BR, D], tl.float32)
    target = tl.zeros([BR, D], tl.float32)
    tau = tl.zeros([BR], tl.float32)
    beta = tl.zeros([BR], tl.float32)
    for start in range(0, end, BC):
        keys = start + tl.arange(0, BC)
        k = load_rows(K, keys, S, d, D)
        w = tl.exp(masked_logits(q, k, scale, rows, keys, L, S, reach, HIDDEN, CAUSAL, MASKED, IN) - shift[:, None])
        v = load_rows(V, keys, S, dv, DV)
        C = w * tl.dot(do, tl.trans(v), input_precision=IN) / delta[:, None]
        rho_z = tl.dot(rho, tl.trans(k), input_precision=IN) - rho_offset[:, None]
        beta += tl.sum(C * (1 - rho_z), 1)
        tau += tl.sum(C, 1)
        target += tl.dot(C, k, input_precision=IN)
        first += tl.dot(w, k, input_precision=IN)
        if JACOBI:
            second += tl.dot(w, k * k, input_precision=IN)
    beta = beta / delta
    target -= tau[:, None] * offset

    mu = first - omega[:, None] * offset
    loading = tl.where(omega > 0, ridge * omega, 1.0)
    inverse = tl.full([BR, D], 1.0, tl.float32)
    if JACOBI:
        about = second - offset * (2 * mu + omega[:, None] * offset)
        inverse = 1 / (tl.maximum(about, 0.0) + loading[:, None])
    U, steps, unconverged = conjugate_gradients(
        target, inverse, tol2, max_iter, q, offset, scale, shift, mu, loading, K, rows, end, L, S, reach, HIDDEN, d,
        CAUSAL, MASKED, BR, BC, D, IN,
    )  # fmt: skip
    a = beta[:, None] * rho - U
    a_rho = tl.sum(a * rho, 1)
    a_offset = tl.sum(a * offset, 1)

    along = tl.zeros([BR, D], tl.float32)
    sum_rho = tl.zeros([BR], tl.float32)
    sum_a = tl.zeros([BR], tl.float32)
    rowsum = tl.zeros([BR], tl.float32)
    for start in range(0, end, BC):
        keys = start + tl.arange(0, BC)
        k = load_rows(K, keys, S, d, D)
        w = tl.exp(masked_logits(q, k, scale, rows, keys, L, S, reach, HIDDEN, CAUSAL, MASKED, IN) - shift[:, None])
        v = load_rows(V, keys, S, dv, DV)
        G = tl.dot(do, tl.trans(v), input_precision=IN) / delta[:, None]
        rho_z = tl.dot(rho, tl.trans(k), input_precision=IN) - rho_offset[:, None]
        a_z = tl.dot(a, tl.trans(k), input_precision=IN) - a_offset[:, None]
        logit, through_rho, through_a = pair_gradients(w, G, rho_z, a_z, beta, ridge * a_rho, EXACT)
        along += tl.dot(logit, k, input_precision=IN)
        sum_rho += tl.sum(through_rho, 1)
        sum_a += tl.sum(through_a, 1)
        rowsum += tl.sum(logit, 1)
    to_mu = a + beta[:, None] * rho
    dq = scale[:, None] * along + sum_rho[:, None] * rho + sum_a[:, None] * a - omega[:, None] * to_mu
    store_rows(DQ + head * L * d, dq, rows, L, d, D)
    store_rows(A + head * L * d, a, rows, L, d, D)
    tl.store(DSCALE + head * L + rows, tl.sum(q * along, 1), mask=rows < L)
    tl.store(DRIDGE + head * L + rows, -omega * a_rho, mask=rows < L)
    tl.store(ROWSUM + head * L + rows, rowsum, mask=rows < L)
    tl.store(BETA + head * L + rows, beta, mask=rows < L)
    tl.store(STEPS + head * tl.num_programs(0) + block, steps)
    tl.store(UNCONVERGED + head * L + rows, unconverged.to(tl.int32), mask=rows < L)


@triton.jit
def key_kernel(
    Q, OFFSET, K, V, SCALE, RIDGE, HIDDEN, RHO, A, DELTA, BETA, SHIFT, DO, DK, DV_OUT,
    L, S, reach, group, d, dv,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """Gradients to a block of keys and values, from all queries of the group that see them."""
    block, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys = block * BC + tl.arange(0, BC)
    HIDDEN += kv_head * S
    k, v = load_rows(K + kv_head * S * d, keys, S, d, D), load_rows(V + kv_head * S * dv, keys, S, dv, DV)
    dk = tl.zeros([BC, D], tl.float32)
    dvalues = tl.zeros([BC, DV], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.maximum(0, block * BC - reach + 1) // BR * BR  # the first block of queries not wholly before
    for member in range(0, group):
        head = kv_head * group + member
        for start in range(begin, L, BR):
            rows = start + tl.arange(0, BR)
            q, offset = load_rows(Q + head * L * d, rows, L, d, D), load_rows(OFFSET + head * L * d, rows, L, d, D)
            rho, a = load_rows(RHO + head * L * d, rows, L, d, D), load_rows(A + head * L * d, rows, L, d, D)
            do = load_rows(DO + head * L * dv, rows, L, dv, DV)
            scale = tl.load(SCALE + head * L + rows, mask=rows < L, other=1.0)
            ridge = tl.load(RIDGE + head * L + rows, mask=rows < L, other=1.0)
            delta = tl.load(DELTA + head * L + rows, mask=rows < L, other=1.0)
            beta = tl.load(BETA + head * L + rows, mask=rows < L, other=0.0)
            shift = tl.load(SHIFT + head * L + rows, mask=rows < L, other=0.0)
            w = tl.exp(masked_logits(q, k, scale, rows, keys, L, S, reach, HIDDEN, CAUSAL, MASKED, IN) - shift[:, None])
            do = do / delta[:, None]
            G = tl.dot(do, tl.trans(v), input_precision=IN)
            rho_z = tl.dot(rho, tl.trans(k), input_precision=IN) - tl.sum(rho * offset, 1)[:, None]
            a_z = tl.dot(a, tl.trans(k), input_precision=IN) - tl.sum(a * offset, 1)[:, None]
            along_rho = ridge * tl.sum(a * rho, 1)
            logit, through_rho, through_a = pair_gradients(w, G, rho_z, a_z, beta, along_rho, EXACT)
            to_mu = a + beta[:, None] * rho
            dvalues += tl.dot(tl.trans(w * (1 - rho_z)), do, input_precision=IN)
            dk += tl.dot(tl.trans(logit), scale[:, None] * q, input_precision=IN)
            dk += tl.dot(tl.trans(w), to_mu, input_precision=IN)
            dk -= tl.dot(tl.trans(through_rho), rho, input_precision=IN)
            dk -= tl.dot(tl.trans(through_a), a, input_precision=IN)
    store_rows(DK + kv_head * S * d, dk, keys, S, d, D)
    store_rows(DV_OUT + kv_head * S * dv, dvalues, keys, S, dv, DV)
