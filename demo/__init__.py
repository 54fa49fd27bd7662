"""The demo's parts, which the tests use too: disposable servers and a ConsentOS database."""
