from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import PathRefusedError
from gateway.paths import is_gateway_path, is_plainly_gateway_path


@pytest.mark.parametrize(
    "path",
    [
        b"/v1",
        b"/v1/",
        b"/v1/models",
        b"/v1/chat/completions",
        b"/v1/models/ft:gpt-4o-mini:acme::id",
        b"/v1/files/a%2Fb",
        b"/v1/files/%E4%BD%A0%E5%A5%BD",
        b"/v1/files/100%25",
        b"/v1//models",
        b"/v1/./models",
        b"/v1/a/../models",
        b"/v1/a/..b/...",
        b"/v1/x;y=1/z",
        b"/v1/a%20..",
        b"/v1/.%20x/%c3%a9",
        b"/v1/%u4f60",
        b"/v1/unknown_route!$&'()*+,=:@",
    ],
)
def test_a_path_below_v1_by_every_reading_goes_upstream(path: bytes) -> None:
    assert is_gateway_path(path) is True


@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/admin/",
        b"/v10/models",
        b"/v1x",
        b"/V1/models",
        b"/pro/balance",
        b"/static/a%20b",
        b"/pro/sessions/a%0Ab/..%20",
    ],
)
def test_a_path_outside_v1_by_every_reading_is_the_sites(path: bytes) -> None:
    assert is_gateway_path(path) is False


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/../admin",
        b"/v1/../v1/models",
        b"/v1/..",
        b"/v1/..%2fadmin",
        b"/v1/%2e%2e/admin",
        b"/v1/%2E%2E%2Fadmin",
        b"/v1/.%2e/admin",
        b"/v1/a/../../admin",
        b"/v1/%252e%252e/admin",
        b"/v1/%25252e%25252e/admin",
        b"/v1/..\\admin",
        b"/v1/..%5cadmin",
        b"/v1/..;/admin",
        b"/v1/..;x=1/admin",
        b"/admin/../v1/models",
        b"/admin/%2e%2e/v1/models",
        b"//v1/models",
        b"/%76%31/models",
        b"/%2fv1/models",
        b"/v1%2fmodels",
        b"/v1;x/models",
        b"/./v1/models",
        b"/v1/%2525252525252e",
        b"/v1/%c0%ae%c0%ae/admin",
        b"/v1/\xc0\xae\xc0\xae/admin",
        b"/v1/..%c0%afadmin",
        b"/v1/..%c1%9cadmin",
        b"/v1/%e0%80%ae%e0%80%ae/admin",
        b"/v1/%f0%80%80%ae%f0%80%80%ae/admin",
        b"/v1/%25c0%25ae%25c0%25ae/admin",
        b"/v1/%u002e%u002e/admin",
        b"/v1/..%U002fadmin",
        b"/v1/..%00/admin",
        b"/v1/%00",
        b"/v1/a%0d%0ab",
        b"/v1/%7f",
        b"/v1/..%20/admin",
        b"/v1/%20../admin",
        b"/v1/%20.%20",
        b"/v1/..%20;x=1/admin",
        b"/v1/..%2520/admin",
    ],
)
def test_a_path_that_means_two_things_is_refused(path: bytes) -> None:
    with pytest.raises(PathRefusedError):
        is_gateway_path(path)


_PIECES = st.sampled_from(
    [b"v1", b"admin", b"..", b".", b"%2e", b"%2f", b"/", b"\\", b";", b"%25", b"%5c", b"x", b"%76", b"%31", b"%"]
)


@given(st.lists(_PIECES, max_size=12))
def test_every_path_is_placed_or_refused(pieces: list[bytes]) -> None:
    path = b"/" + b"".join(pieces)
    try:
        ours = is_gateway_path(path)
    except PathRefusedError:
        return
    assert ours == (path == b"/v1" or path.startswith(b"/v1/"))


def test_routes_of_openais_beside_v1_are_no_gateway_paths() -> None:
    for path in (b"/dashboard/billing/usage", b"/dashboard/billing/subscription/", b"/v1x/models"):
        assert not is_gateway_path(path)
        assert not is_plainly_gateway_path(path)
    assert is_plainly_gateway_path(b"/v1/models")
