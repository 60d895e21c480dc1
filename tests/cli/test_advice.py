"""How another board joins, as the page tells whoever may use the API: by a line that has no secret in it."""

import pytest

from flowspec_edge.cli.access import Access
from flowspec_edge.cli.advice import join_advice
from flowspec_edge.core.cluster.key_text import format_key
from flowspec_edge.net.auth import derive_credentials

SECRET = bytes(range(20))


@pytest.mark.parametrize("cluster", ["flowspec", "lab"])
def test_where_there_is_a_cluster_key_it_stays_where_it_is(cluster: str) -> None:
    access = Access("0.0.0.0", derive_credentials(SECRET), new_key=format_key(SECRET))
    advice = join_advice(access, cluster)
    assert advice["command"] == "flowspec key show" and "code" not in advice
    assert ("--cluster lab" in advice["text"]) == (cluster == "lab")
    assert format_key(SECRET)[5:] not in str(advice)


def test_without_one_the_line_is_whole_or_says_that_one_is_needed() -> None:
    whole = join_advice(Access("0.0.0.0", is_insecure=True), "lab")
    assert whole["command"].endswith(" --cluster lab")
    assert {len(row) for row in whole["code"]} == {len(whole["code"])} and whole["code"][0].startswith("11111110")
    assert join_advice(Access("127.0.0.1"), "flowspec")["command"] == "flowspec key new"
