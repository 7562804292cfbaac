"""Many concurrent callers on one router: calls that arrive together become one batch."""

import asyncio
import time

from p2l_engine import Catalog, Engine, Router


async def main() -> None:
    engine = Engine.from_pretrained()
    with Router(engine, Catalog.from_yaml(engine.folder / "catalog.yaml")) as router:
        router.warmup()  # before traffic
        start = time.perf_counter()
        calls = [router.aroute(f"What is {i} * 23?", budget=0.0005) for i in range(32)]
        decisions = await asyncio.gather(*calls)
        print(f"{len(decisions)} decisions in {time.perf_counter() - start:.2f} s, the first: {decisions[0].model}")


asyncio.run(main())
