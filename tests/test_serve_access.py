"""Who may ask a server: keys, names of hosts, other sites, and proxies before it."""

from test_serve import KEY, Client, model, no_compile_cache, words  # noqa: F401

from coca_jax.apps.serve import app


def test_who_may_ask(model):  # noqa: F811
    client = Client(model, key=KEY)
    try:
        right = {"Authorization": f"Bearer {KEY}"}
        assert {client.get(path)[0] for path in ("/healthz", *app.PAGE)} == {200}
        for path in ("/api/info", "/metrics", "/openapi.json"):
            status, headers, data = client.get(path)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert client.get(path, {"Authorization": f"Bearer {KEY}x"})[0] == 401
            assert client.get(path, right)[0] == 200
        assert "key" in client.refused(401, "/api/embed", ("text", "red"))
        assert client.post("/api/embed", ("text", "red"), headers=right)[0] == 200
        assert client.get("/api/info", {"Host": "evil.example"} | right)[0] == 403  # rebinding
        assert client.get("/", {"Host": f"127.0.0.1:{client.port}"})[0] == 200
        other = {"Origin": "https://evil.example"} | right
        assert "other sites" in client.refused(403, "/api/embed", ("text", "red"), headers=other)
        own = {"Origin": f"http://127.0.0.1:{client.port}"} | right
        assert client.post("/api/embed", ("text", "red"), headers=own)[0] == 200
    finally:
        client.close()


def test_a_proxy_that_is_named_may_stand_before_it(model):  # noqa: F811
    """With its own Host, as nginx sets it, or with the one that it was asked by."""
    client = Client(model, key=KEY, public_name="Coca.example.org")
    inner, page = f"127.0.0.1:{client.port}", "https://coca.example.org"
    try:
        for host, origin, wanted in (
            (inner, page, 200),
            ("coca.example.org", page, 200),
            ("coca.example.org:8443", f"{page}:8443", 200),
            (inner, f"http://{inner}", 200),
            (inner, "https://coca.example.org.evil.example", 403),
            (inner, "null", 403),
            ("evil.example", page, 403),
        ):
            given = {"Host": host, "Origin": origin, "Authorization": f"Bearer {KEY}"}
            assert client.post("/api/embed", ("text", "red"), headers=given)[0] == wanted, given
    finally:
        client.close()
