"""Many stories on one model: `Teller` tells them by turns."""
