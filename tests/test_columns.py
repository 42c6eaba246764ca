import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_influence.trajectory.columns import encode, number, to_numpy

INTEGERS = st.one_of(st.none(), st.integers(-(2**60), 2**60))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.int64(), INTEGERS),
        (pa.float64(), st.one_of(st.none(), st.floats(allow_nan=False))),
        (pa.bool_(), st.one_of(st.none(), st.booleans())),
        (pa.list_(pa.list_(pa.int64())), st.one_of(st.none(), st.lists(st.one_of(st.none(), st.lists(INTEGERS))))),
        (
            pa.struct([("a", pa.binary()), ("b", pa.bool_())]),
            st.one_of(st.none(), st.fixed_dictionaries({"a": st.binary(), "b": st.none()})),
        ),
    ],
    ids=str,
)
def test_arrays_are_those_of_pyarrow(kind, values):
    @settings(deadline=None)
    @given(st.lists(values, max_size=12))
    def check(column):
        made = encode(column, kind)
        made.validate(full=True)
        assert made.to_pylist() == column == pa.array(column, kind).to_pylist()

    check()


@settings(deadline=None)
@given(st.lists(st.integers(-(2**60), 2**60), max_size=12), st.integers(0, 12))
def test_columns_are_numpy_arrays_and_parts_of_them_too(values, start):
    for array in (pa.array(values, pa.int64()), pa.array([*values, None], pa.int64())):
        for part in (array.slice(start), pa.chunked_array([array, array]).slice(start)):
            np.testing.assert_array_equal(to_numpy(part), part.to_numpy(*[False] * isinstance(part, pa.Array)))


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32()])
def test_numbers_are_those_of_pyarrow(kind):
    assert number(-7, kind) == pa.scalar(-7, kind)


@pytest.mark.slow
def test_a_fit_and_its_first_question_do_not_import_pandas():
    pytest.importorskip("pandas")
    code = (
        "import sys, tempfile; from fits import Net, fit, loader, seeded; fit(seeded(Net), loader(), max_epochs=1);"
        "from lightning_influence import Influence, TracInCP\n"
        "assert 'pandas' not in sys.modules, 'another package has imported it'\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    influence = Influence(dirpath=folder)\n"
        "    fit(seeded(Net), loader(), influence)\n"
        "    influence.attributor.score(TracInCP(), loader().dataset).values\n"
        "assert 'pandas' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    made = subprocess.run([sys.executable, "-c", code], cwd=root / "tests", capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
