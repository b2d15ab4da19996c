"""Several arms compared: does a defense beat training less?"""
