"""The quantised variant of Mustafar's code base, forwarded to kvpack."""
