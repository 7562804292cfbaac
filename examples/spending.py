"""Hard limits on money spent: reserve the worst case, settle what it cost, and take a cheaper model when a limit is near."""

import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

from p2l_engine.routing import Limit, SpendLimit, SpendLimitReached

PRICES = {"large": Decimal("0.00001"), "small": Decimal("0.0000005")}  # dollars for a token of output
MAX_TOKENS = 1000

spending = SpendLimit(
    [Limit(1, "day"), Limit(Decimal("0.6"), "day", each_key=True)],
    store=tempfile.mkdtemp() + "/spend.sqlite",  # processes that name the same file share its limits
    on_notice=lambda notice: print(f"{notice.limit}: {100 * notice.level:.0f}% of {notice.amount:.2f} dollars"),
)


def answer(request: int) -> str:
    """The best model that the limits allow."""
    for model, price in PRICES.items():
        try:
            token = spending.reserve(price * MAX_TOKENS, key="team a" if request % 2 else "team b")
        except SpendLimitReached:
            continue  # a cheaper one may fit
        tokens = random.Random(request).randint(50, MAX_TOKENS)  # here the model would answer
        spending.settle(token, price * tokens)
        return model
    return "none"


with ThreadPoolExecutor(16) as pool:
    models = list(pool.map(answer, range(400)))
print({model: models.count(model) for model in (*PRICES, "none")})
for balance in spending.balances("team a"):
    print(f"{balance.limit}: {balance.spent:.4f} of {balance.amount:.2f} dollars, {balance.left:.4f} left until {balance.ends}")
