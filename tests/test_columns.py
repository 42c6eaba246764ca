import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_influence.trajectory.columns import encode

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
    @given(st.lists(values, max_size=12))
    def check(column):
        made = encode(column, kind)
        made.validate(full=True)
        assert made.to_pylist() == column == pa.array(column, kind).to_pylist()

    check()
