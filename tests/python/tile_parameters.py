"""Parameters of tiles for property tests; by itself, since machines with a GPU may lack hypothesis."""

from hypothesis import strategies as st

tile_parameters = st.tuples(
    st.sampled_from(("key", "value")),
    st.sampled_from((1, 2, 4, 8, 16)),
    st.integers(0, 200),
    st.sampled_from([64, 128, 256]),
    st.sampled_from([0.0, 0.3, 0.7, 0.99]),
    st.integers(0, 2**32 - 1),
)
"""kind, bits, tokens, head_dim, sparsity, seed."""
