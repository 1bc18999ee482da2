"""Install a package for one session, in the middle of its work. The executed code itself has no network.

To run it: python tests/examples/packages.py
"""

import anyio

from sandbox_runner import load_config, open_runner


async def main() -> None:
    async with open_runner(load_config()) as runner:
        await runner.execute("sizes = [12, 3_400, 5_600_000]", session="sizes")

        result = await runner.execute("import humanize", session="sizes")
        if result.exception and result.exception.missing:
            print(f"{result.exception.missing} is missing")

        installation = await runner.install("humanize>=4", session="sizes")
        print(installation.message)
        if not installation.ok:
            raise SystemExit(installation.output)

        # The variables are still there, and the package can be imported at once.
        result = await runner.execute("import humanize\nlist(map(humanize.naturalsize, sizes))", session="sizes")
        print(result.value)
        await runner.close_session("sizes")


anyio.run(main)
