"""The algebra of parts and blocks against the rows written out, whatever the shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.gradients import outer_products
from lightning_influence.gradients.block import Gradients
from lightning_influence.gradients.dense_rows import DenseRows
from lightning_influence.gradients.derivations import Elementwise, Replayed, Selection
from lightning_influence.gradients.lookup import Lookup
from lightning_influence.gradients.outer_products import OuterProducts
from lightning_influence.gradients.pulled import Pulled
from lightning_influence.gradients.queries import DenseQueries, EachQuery
from lightning_influence.gradients.sum_of_parts import SumOfParts
from lightning_influence.numerics.projections import KroneckerSketch, PlainSketch, Projector, RandomProjection

IN, OUT = 3, 4
KINDS = ("outer", "outer with bias", "rows", "two rows", "lookup", "mixed", "number", "slice", "masked", "computed")
MASK = torch.arange(OUT * IN, dtype=torch.float64).view(OUT, IN) % 5 - 0.5
PARAMETERS = (torch.arange(1.0, 1 + OUT * IN).double().view(OUT, IN), torch.linspace(1, 2, OUT).double())
many = settings(max_examples=60, deadline=None, derandomize=True)


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def part(kind, n, positions, generator):
    """One part; those of one kind are of the same parameters whatever their positions."""
    if kind.startswith("outer"):
        bias = kind.endswith("bias")
        made = OuterProducts(normal(generator, n, positions, IN), normal(generator, n, positions, OUT), (OUT, IN), bias)
        return made.scaled(normal(generator, n)) if positions % 2 else made
    if kind == "lookup":
        ids = torch.randint(-1, OUT, (n, positions), generator=generator)
        return Lookup(ids, normal(generator, n, positions, IN), (OUT, IN))
    if kind == "mixed":
        return SumOfParts((part("lookup", n, positions, generator), part("outer", n, 1 + positions, generator)))
    if kind == "number":
        return DenseRows((normal(generator, n),))
    if kind in ("slice", "other slice"):  # two rows of the transposed matrix
        by_weight = OuterProducts(normal(generator, n, positions, OUT), normal(generator, n, positions, 2), (2, OUT))
        return Pulled(by_weight, Selection((OUT, IN), (2, OUT), (1, IN), int(kind == "slice")))
    if kind == "masked":
        return Pulled(part("outer", n, positions, generator), Elementwise(MASK, MASK.shape))
    if kind == "computed":
        derivation = Replayed(lambda w, g: w / w.norm(dim=1, keepdim=True) * g[:, None], PARAMETERS, "norm")
        return Pulled(part("outer", n, positions, generator), derivation)
    rows = normal(generator, n, OUT, IN)
    return DenseRows((rows, normal(generator, n, OUT))) if kind == "two rows" else DenseRows((rows,))


def written_out(made):
    return torch.cat([r.reshape(len(r), -1) for r in made.dense()], 1)


@st.composite
def pairs(draw):
    """Two parts of the same parameters, in any two forms."""
    with_bias = draw(
        st.sampled_from(
            (
                ("outer with bias", "two rows", "computed"),
                ("outer", "rows", "lookup", "mixed", "slice", "other slice", "masked"),
                ("number",),
            )
        )
    )
    kinds = draw(st.sampled_from(with_bias)), draw(st.sampled_from(with_bias))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sizes = st.tuples(st.integers(1, 12), st.integers(1, 9))
    return tuple(part(kind, *draw(sizes), generator) for kind in kinds)


@many
@given(pairs())
def test_inner_products_of_any_two_forms_are_those_of_their_rows(two):
    left, right = two
    out = torch.ones(len(left), len(right), dtype=torch.float64)
    left.accumulate_dot(right, out)
    torch.testing.assert_close(out, 1 + written_out(left) @ written_out(right).T)


@many
@given(pairs(), st.integers(0, 999))
def test_norms_totals_and_products_with_a_vector_are_those_of_the_rows(two, seed):
    made, generator = two[0], torch.Generator().manual_seed(seed)
    rows = written_out(made)
    vectors = tuple(normal(generator, *r.shape[1:]) for r in made.dense())
    torch.testing.assert_close(made.norm2(), rows.square().sum(1))
    torch.testing.assert_close(torch.cat([t.flatten() for t in made.total()]), rows.sum(0))
    torch.testing.assert_close(made.times(vectors), rows @ torch.cat([v.flatten() for v in vectors]))


@many
@given(pairs(), st.integers(0, 999))
def test_products_of_each_row_with_its_own_are_those_of_the_rows(two, seed):
    count, generator = min(map(len, two)), torch.Generator().manual_seed(seed)
    left, right = (made.slice(slice(count)) for made in two)
    shapes = [r.shape[1:] for r in left.dense()]
    own = tuple(normal(generator, count, *shape) for shape in shapes)
    entries = tuple(normal(generator, *shape) for shape in shapes)
    weights = tuple(normal(generator, 2, *shape) for shape in shapes)
    one, other = written_out(left), written_out(right)
    together = torch.cat([v.reshape(count, -1) for v in own], 1)
    factors = torch.cat([e.flatten() for e in entries])
    tables = torch.cat([w.reshape(2, -1) for w in weights], 1)
    torch.testing.assert_close(left.times_own(own), (one * together).sum(1))
    torch.testing.assert_close(left.own_dot(right), (one * other).sum(1))
    torch.testing.assert_close(left.own_dot(right, entries), (one * other * factors).sum(1))
    torch.testing.assert_close(left.weighted_norm2(weights), tables @ one.square().T)


@many
@given(pairs(), st.integers(0, 12), st.integers(0, 12), st.integers(0, 999))
def test_slices_and_scaled_parts_are_slices_and_multiples_of_the_rows(two, start, length, seed):
    made = two[0]
    factor = normal(torch.Generator().manual_seed(seed), len(made))
    rows, some = written_out(made), slice(start, start + length)
    changed = made.scaled(factor).slice(some)
    expected = (rows * factor[:, None])[some]
    assert len(changed) == len(expected)
    torch.testing.assert_close(
        torch.cat([d.flatten(1) if d.ndim > 1 else d[:, None] for d in changed.dense()], 1), expected
    )
    torch.testing.assert_close(changed.norm2(), expected.square().sum(1))


@many
@given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_a_second_use_of_a_parameter_adds_up(kind, n, first, second, seed):
    generator = torch.Generator().manual_seed(seed)
    one, two = part(kind, n, 2 * first, generator), part(kind, n, 2 * second, generator)
    joined = one.merged(two)
    assert joined is not None
    torch.testing.assert_close(written_out(joined), written_out(one) + written_out(two))


@many
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_two_uses_under_their_own_factors_add_up(n, first, second, seed):
    generator = torch.Generator().manual_seed(seed)
    one = part("outer with bias", n, first, generator).scaled(normal(generator, n))
    two = part("outer with bias", n, second, generator)
    joined = one.merged(two)
    assert joined is not None
    torch.testing.assert_close(written_out(joined), written_out(one) + written_out(two))


@many
@given(pairs())
def test_one_part_a_parameter_holds_the_same_gradients(two):
    made = two[0]
    for one, rows in zip(made.per_parameter(), made.dense(), strict=True):
        torch.testing.assert_close(one.dense(), (rows,))


def block(n, generator, together=True):
    """A block of a layer with bias, a table and a number; weight and bias in one part or in two."""
    layer = part("outer with bias", n, 3, generator)
    parts = {("a.weight", "a.bias"): layer}
    if not together:
        parts = {("a.weight",): layer.per_parameter()[0], ("a.bias",): layer.per_parameter()[1]}
    parts |= {("table.weight",): part("lookup", n, 4, generator), ("scale",): part("number", n, 1, generator)}
    return Gradients(parts, {names: int(names[0] == "scale") for names in parts}, n)


def of(gradients):
    return torch.cat([v.reshape(len(gradients), -1) for _, v in sorted(gradients.dense().items())], 1)


@many
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 999))
def test_blocks_multiply_whichever_parts_their_parameters_share(n, m, mine, theirs, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = block(n, generator, mine), block(m, generator, theirs)
    torch.testing.assert_close(left.dot(right), of(left) @ of(right).T)
    least = slice(min(n, m))
    products = left.slice(least).own_dot(right.slice(least))
    torch.testing.assert_close(products, (of(left)[least] * of(right)[least]).sum(1))
    torch.testing.assert_close(EachQuery([left.slice(least)]).diagonal(right.slice(least)), products)
    scale = normal(generator, 2, m)
    number = left.parts["scale",].dense()[0][:, None] * right.parts["scale",].dense()[0]
    expected = (of(left) @ of(right).T - number) * scale[0] + number * scale[1]
    torch.testing.assert_close(left.dot(right, scale), expected)


@many
@given(st.integers(1, 6), st.integers(0, 999))
def test_block_norms_projections_and_vectors_are_those_of_the_rows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    made = block(n, generator)
    rows, scale = of(made), normal(generator, 2, n)
    torch.testing.assert_close(made.norm2(), rows.square().sum(1))
    number = made.parts["scale",].dense()[0].square()
    torch.testing.assert_close(made.norm2(scale), (rows.square().sum(1) - number) * scale[0] + number * scale[1])
    vector = {name: normal(generator, *value.shape[1:]) for name, value in made.dense().items()}
    flat = torch.cat([v.reshape(-1) for _, v in sorted(vector.items())])
    torch.testing.assert_close(made.times(vector), rows @ flat)
    total = torch.cat([v.reshape(-1) for _, v in sorted(made.total().items())])
    torch.testing.assert_close(total, rows.sum(0))


@many
@given(st.integers(1, 6), st.integers(0, 999))
def test_normalised_blocks_have_length_one(n, seed):
    made = block(n, torch.Generator().manual_seed(seed))
    torch.testing.assert_close(made.normalized("cosine").norm2(), torch.ones(n, dtype=torch.float64))
    layers = made.normalized("layerwise")
    for names, one in layers.parts.items():
        length = of(Gradients({names: made.parts[names]}, {}, n)).square().sum(1)
        torch.testing.assert_close(one.norm2(), (length > 0).double())


@many
@given(pairs(), st.sampled_from(("none", "left", "right", "both", "plain")), st.integers(0, 999))
def test_projected_parts_are_projected_rows(two, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = normal(generator, 2, OUT), normal(generator, 2, IN)
    for made in two:
        shapes = [r.shape[1:] for r in made.dense()]
        assert [tuple(shape) for shape in shapes] == list(made.shapes())
        if made.shapes() == ((),):
            continue
        eye_out, eye_in = (torch.eye(n, dtype=torch.float64) for n in (OUT, IN))
        matrix = {
            "none": torch.kron(eye_out, eye_in),
            "left": torch.kron(left, eye_in),
            "right": torch.kron(eye_out, right),
            "both": torch.kron(left, right),
            "plain": normal(generator, 5, OUT * IN),
        }[kind]
        sketch = (
            PlainSketch(matrix)
            if kind == "plain"
            else KroneckerSketch(
                left if kind in ("left", "both") else None, right if kind in ("right", "both") else None
            )
        )
        of_bias = normal(generator, 3, OUT)
        weight, *bias = made.projected((sketch, PlainSketch(of_bias))[: len(shapes)])
        torch.testing.assert_close(written_out(weight), made.dense()[0].flatten(1) @ matrix.T)
        for one in bias:
            torch.testing.assert_close(written_out(one), made.dense()[1] @ of_bias.T)


@many
@given(
    st.integers(1, 6), st.integers(1, 6), st.booleans(), st.sampled_from(("kronecker", "plain")), st.integers(0, 999)
)
def test_products_of_projected_blocks_are_those_of_projected_rows(n, m, together, structure, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = block(n, generator, together), block(m, generator)
    sketches = Projector(RandomProjection(4, structure))
    scale = normal(generator, 2, m)
    mine, theirs = ({k: sketches(k, v.shape[1:], v).rows(v) for k, v in b.dense().items()} for b in (left, right))
    expected = sum((mine[k].reshape(n, -1) @ theirs[k].reshape(m, -1).T) * scale[int(k == "scale")] for k in mine)
    assert mine["a.weight"].shape[1:].numel() <= 4 < left.dense()["a.weight"][0].numel()
    torch.testing.assert_close(left.project(sketches).dot(right.project(sketches), scale), expected)
    mean = DenseQueries({k: v.mean(0, keepdim=True) for k, v in left.dense().items()}, {"scale": 1})
    found = mean.project(sketches).dot(right.project(sketches), scale)
    torch.testing.assert_close(found, expected.mean(0, keepdim=True))


def test_a_gradient_of_zero_stays_zero_when_normalised():
    made = Gradients({("w",): DenseRows((torch.zeros(2, 3),))}, {}, 2).normalized("cosine")
    torch.testing.assert_close(made.norm2(), torch.zeros(2))


def test_a_parameter_that_one_side_does_not_reach_counts_for_nothing():
    left = Gradients({("w",): DenseRows((torch.ones(2, 3),)), ("v",): DenseRows((torch.ones(2, 3),))}, {}, 2)
    right = Gradients({("w",): DenseRows((torch.ones(1, 3),))}, {}, 1)
    torch.testing.assert_close(left.dot(right), torch.full((2, 1), 3.0))
    torch.testing.assert_close(right.dot(left), torch.full((1, 2), 3.0))


def test_examples_that_are_not_finite_are_named_with_their_parameter():
    rows = torch.ones(3, 2)
    rows[1, 0] = torch.nan
    made = Gradients({("w",): DenseRows((torch.ones(3, 2),)), ("v",): DenseRows((rows,))}, {}, 3)
    assert made.not_finite() == {1: "v"}


@many
@given(pairs(), st.integers(1, 20), st.integers(0, 999))
def test_products_with_several_vectors_are_those_of_the_rows(two, count, seed):
    made, generator = two[0], torch.Generator().manual_seed(seed)
    vectors = tuple(normal(generator, count, *r.shape[1:]) for r in made.dense())
    flat = torch.cat([v.reshape(count, -1) for v in vectors], 1)
    torch.testing.assert_close(made.times_each(vectors), flat @ written_out(made).T)


def test_both_orders_of_a_product_with_several_vectors_are_taken_and_chunked(monkeypatch):
    monkeypatch.setattr("lightning_influence.gradients.outer_products.workspace", lambda device: 40)
    generator = torch.Generator().manual_seed(0)
    taken = set()
    monkeypatch.setattr(OuterProducts, "_times_each", spied(OuterProducts._times_each, taken, "inputs first"))
    monkeypatch.setattr(OuterProducts, "_times_rows", spied(OuterProducts._times_rows, taken, "rows"))
    for count, positions in ((1, 1), (30, 1), (2, 6)):
        for transposed in (False, True):
            shape = (IN, OUT) if transposed else (OUT, IN)
            inputs, outputs = normal(generator, 5, positions, IN), normal(generator, 5, positions, OUT)
            made = OuterProducts(inputs, outputs, shape, bias=True, transposed=transposed, factor=normal(generator, 5))
            weight, bias = normal(generator, count, *shape), normal(generator, count, OUT)
            order = "nti,nto->nio" if transposed else "nti,nto->noi"
            rows = torch.einsum(order, inputs, outputs) * made.factor[:, None, None]
            bias_rows = outputs.sum(1) * made.factor[:, None]
            expected = torch.einsum("qab,nab->qn", weight, rows) + bias @ bias_rows.T
            torch.testing.assert_close(made.times_each((weight, bias)), expected)
    assert taken == {"inputs first", "rows"}


def spied(function, taken, word):
    def call(*args):
        taken.add(word)
        return function(*args)

    return call


@many
@given(st.integers(0, 999), st.integers(1, 5), st.sampled_from((None, 1, 2)))
def test_vectors_written_out_are_queries_like_their_factors(seed, size, scaled):
    generator = torch.Generator().manual_seed(seed)
    groups = {("a.weight", "a.bias"): 0, ("b",): 1, ("c",): 0}
    queries = Gradients(
        {("a.weight", "a.bias"): part("outer with bias", 4, 3, generator), ("b",): part("lookup", 4, 2, generator)},
        groups,
        4,
    )
    block = Gradients(
        {
            ("a.weight", "a.bias"): part("outer with bias", size, 2, generator),
            ("b",): part("mixed", size, 2, generator),
            ("c",): part("number", size, 1, generator),
        },
        groups,
        size,
    )
    factored = EachQuery([queries.slice(slice(0, 3)), queries.slice(slice(3, 4))])
    dense = DenseQueries(factored.dense(), {"b": 1})
    scale = {None: None, 1: normal(generator, size), 2: normal(generator, 2, size)}[scaled]
    expected = queries.dot(block, scale)
    torch.testing.assert_close(dense.dot(block, scale), expected)
    torch.testing.assert_close(factored.dot(block, scale), expected)
    torch.testing.assert_close(dense.norm2(), queries.norm2())
    torch.testing.assert_close(factored.norm2(), queries.norm2())
    vector = {name: normal(generator, *rows.shape[1:]) for name, rows in dense.dense().items()}
    torch.testing.assert_close(dense.times(vector), queries.times(vector))
    torch.testing.assert_close(factored.times(vector), queries.times(vector))
    for how in ("cosine", "layerwise"):
        torch.testing.assert_close(dense.normalized(how).dot(block), queries.normalized(how).dot(block))
    own = queries.slice(slice(0, len(queries)))
    torch.testing.assert_close(dense.diagonal(own), queries.norm2())


def test_a_parameter_that_no_query_reaches_counts_as_zero():
    generator = torch.Generator().manual_seed(0)
    block = Gradients({("c",): part("number", 3, 1, generator)}, {}, 3)
    queries = DenseQueries({"b": normal(generator, 2, 4)}, {})
    assert queries.dot(block).shape == (2, 3)
    assert not queries.dot(block).any()


def test_blocks_that_reach_different_parameters_are_written_out_with_zeros():
    generator = torch.Generator().manual_seed(0)
    first, second = (Gradients({(n,): part("rows", 2, 1, generator)}, {}, 2) for n in "ab")
    dense = EachQuery([first, second]).dense()
    torch.testing.assert_close(dense["a"][:2], first.dense()["a"])
    torch.testing.assert_close(dense["b"][2:], second.dense()["b"])
    assert not dense["a"][2:].any()
    assert not dense["b"][:2].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_weight_is_multiplied_in_strips(bias, transposed, monkeypatch):
    monkeypatch.setattr(outer_products, "WHOLE", 1)
    monkeypatch.setattr(outer_products, "ROWS", 2**21 // 6)
    generator, shape = torch.Generator().manual_seed(0), (IN, OUT) if transposed else (OUT, IN)
    one, two = (
        OuterProducts(normal(generator, n, 40, IN), normal(generator, n, 40, OUT), shape, bias, transposed).scaled(
            normal(generator, n)
        )
        for n in (3, 5)
    )
    assert len(list(one._strips())) > 1
    out = torch.zeros(3, 5, dtype=torch.float64)
    one.accumulate_dot(two, out)
    torch.testing.assert_close(out, written_out(one) @ written_out(two).T)
    torch.testing.assert_close(torch.cat([s.flatten() for s in two.squares()]), written_out(two).square().sum(0))


@many
@given(st.integers(1, 6), st.integers(1, 9), st.booleans(), st.integers(0, 999))
def test_a_mask_of_few_distinct_rows_stays_in_factors(n, m, transposed, seed):
    generator, degrees = torch.Generator().manual_seed(seed), torch.arange(40) % 2
    mask = (degrees[:, None] >= degrees[:30]).double() + 0.5
    derivation = Elementwise(mask, mask.shape)
    assert derivation.tiles is not None
    width = (40, 30) if transposed else (30, 40)
    one, two = (
        Pulled(
            OuterProducts(
                normal(generator, k, 1, width[0]), normal(generator, k, 1, width[1]), (40, 30), False, transposed
            ),
            Elementwise(mask, mask.shape),
        ).scaled(normal(generator, k))
        for k in (n, m)
    )
    out = torch.ones(n, m, dtype=torch.float64)
    assert one._accumulate_tiles(derivation, two, out)
    torch.testing.assert_close(out, 1 + written_out(one) @ written_out(two).T)
