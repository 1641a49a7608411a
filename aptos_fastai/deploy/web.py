"What every local page needs: headers, JSON errors, a check of the host name, a server that says its address."
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from aptos_fastai.common.console import say
from aptos_fastai.common.io import AptosError

CSP = ("default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
       "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'")
HEADERS = {'Content-Security-Policy': CSP, 'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer',
           'Cache-Control': 'no-store'}
PUBLIC = '0.0.0.0', '::'                     # addresses that listen to every network


class RequestError(Exception):
    "A request that cannot be served: HTTP status and reason."
    def __init__(self, status: int, reason: str): self.status, self.reason = status, reason


# Applications

def get_application(routes: Sequence, hosts: Sequence[str], lifespan: Any = None):
    """Return a Starlette application whose errors are all JSON with the key `error`.

    It accepts only requests to `hosts` ('*': all), so that no other web site can reach it through a host name of its
    own. A `RequestError` of a route becomes its status and reason.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    handlers: dict = {RequestError: _refused, HTTPException: _http_error, Exception: _failed}
    app = Starlette(routes=list(routes), lifespan=lifespan, exception_handlers=handlers,
                    middleware=[Middleware(AllowedHosts, hosts=hosts)])
    app.router.redirect_slashes = False      # /api/ is an error, too: a redirection is no JSON
    return app


def json_reply(content: Any, status: int = 200, headers: dict[str, str] | None = None):
    "Return a JSON response with the headers of every page"
    from starlette.responses import JSONResponse
    return JSONResponse(content, status, headers=HEADERS | (headers or {}))


async def _refused(request, e):
    retry = {'Retry-After': '5'} if e.status == 503 else {}
    return json_reply(dict(error=e.reason), e.status, retry)


async def _http_error(request, e):
    reasons = {404: f'no such path: {request.url.path}', 405: f'{request.method} is not allowed here'}
    return json_reply(dict(error=reasons.get(e.status_code, e.detail)), e.status_code, e.headers)


async def _failed(request, e):
    return json_reply(dict(error=f'internal error ({type(e).__name__}); the terminal of the server shows it'), 500)


class AllowedHosts:
    "ASGI middleware: a request to another host name gets status 400"
    def __init__(self, app, hosts: Sequence[str]):
        self.app, self.hosts = app, {host.strip('[]').casefold() for host in hosts}

    async def __call__(self, scope, receive, send):
        "Serve a request if its host is allowed"
        if scope['type'] != 'http' or '*' in self.hosts: return await self.app(scope, receive, send)
        header = dict(scope['headers']).get(b'host', b'').decode('latin-1')
        if host_name(header) in self.hosts: return await self.app(scope, receive, send)
        known = ', '.join(sorted(self.hosts))
        reply = json_reply(dict(error=f'host name {header[:80]!r} is not served here; use one of: {known}'), 400)
        return await reply(scope, receive, send)


def host_name(header: str) -> str:
    "Return the host name of a Host header without its port: 'localhost:8000' -> 'localhost'; '' for no valid one"
    try: return urlsplit(f'//{header}').hostname or ''
    except ValueError: return ''


# Servers

def require_packages(command: str, packages: Iterable[str]) -> None:
    "Raise `AptosError` if a package that a page needs is not installed"
    if all(find_spec(package) for package in packages): return
    raise AptosError(f'{command} needs the extra serve. Run `pip install starlette uvicorn python-multipart`.')


def trusted_hosts(host: str) -> list[str]:
    "Return the host names that a page on `host` accepts; say so if that is every name"
    if host not in PUBLIC: return ['127.0.0.1', 'localhost', '::1', host]
    say(f'{host}: everyone who can reach this machine can use the page; it asks for no password', 'yellow')
    return ['*']


def server_url(host: str, port: int) -> str:
    "Return the address of a page for people: that of this machine where it listens to every network"
    name = socket.gethostname() if host in PUBLIC else host
    return f'http://[{name}]:{port}' if ':' in name else f'http://{name}:{port}'


def run_server(app, host: str, port: int, *notes: str) -> None:
    "Serve an ASGI application until it is stopped; `notes` are said after its address. Raises `AptosError`"
    import uvicorn
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try: sock = socket.create_server((host, port), family=family, backlog=256)
    except OSError as e:
        raise AptosError(f'{host}:{port}: cannot listen ({e.strerror}). Choose another port with --port.') from None
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level='warning', server_header=False))
    threading.Thread(target=_announce, args=(server, server_url(host, port), notes), daemon=True).start()
    with sock: server.run(sockets=[sock])


def _announce(server, url: str, notes: Sequence[str]) -> None:
    "Say the page's address once the server has started"
    while not server.started and not server.should_exit: time.sleep(.05)
    if not server.started: return
    first, *more = notes
    say(f'serving {url} (stop with Ctrl-C); {first}')
    for note in more: say(note)
