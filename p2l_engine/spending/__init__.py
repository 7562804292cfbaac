"""Hard limits on money really spent, shared by threads, processes and machines; part of ``p2l_engine.routing``'s interface."""
