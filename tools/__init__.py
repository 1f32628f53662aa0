"""What is done beside the library, now and then: asked for by hand, not part of the wheel."""
