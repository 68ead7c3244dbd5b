import threading
from collections import OrderedDict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from backend.map_cache import MapCache


def _maps(n_floats, value=0.0):
    return np.full((2, 1, n_floats), value, np.float32)


@given(
    st.integers(0, 200), st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 12), st.booleans()), max_size=40)
)
def test_never_over_the_limit_and_drops_the_least_recently_used(limit, steps):
    cache, expected = MapCache(limit), OrderedDict()
    for name, size, reads in steps:
        key = (name, "v1")
        if reads:
            found = cache.get(key)
            assert (found is not None) == (key in expected)
            if key in expected:
                expected.move_to_end(key)
            continue
        maps = _maps(size)
        cache.put(key, maps)
        if maps.nbytes <= limit:
            expected.pop(key, None)
            expected[key] = maps
            while sum(kept.nbytes for kept in expected.values()) > limit:
                expected.popitem(last=False)
        assert cache.size_bytes == sum(kept.nbytes for kept in expected.values()) <= limit
        assert len(cache) == len(expected)


def test_another_model_version_is_another_entry():
    cache = MapCache(1000)
    cache.put(("image", "v1"), _maps(3, 1.0))
    assert cache.get(("image", "v2")) is None
    assert cache.get(("image", "v1"))[0, 0, 0] == 1.0


def test_many_threads():
    cache = MapCache(500)

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            key = (str(rng.integers(20)), "v1")
            if cache.get(key) is None:
                cache.put(key, _maps(int(rng.integers(1, 10))))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.size_bytes == sum(maps.nbytes for maps in cache._maps.values()) <= 500
