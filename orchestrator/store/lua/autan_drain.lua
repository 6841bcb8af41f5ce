-- autan_drain: asks an instance to take no new work, or to take it again.
-- ARGV  instance, on ("1" drain, "0" undrain)
-- Reply OK | GONE
-- Promise: after OK with "1" no assign reaches the instance; it hears of it with its next renewal. Idempotent.
local function autan_drain(keys, args)
  local c = open('autan_drain', keys, args)
  local instance = take_name(c, 'instance')
  local on = take_flag(c, 'on')
  taken_all(c)
  local key = k_instance(c, instance)
  if redis.call('EXISTS', key) == 0 then return {'GONE'} end
  redis.call('HSET', key, 'want_drain', on and '1' or '0')
  hint_core(c)
  hint_instance(c, instance)
  return {'OK'}
end
redis.register_function{function_name = 'autan_drain', callback = autan_drain, flags = {'allow-oom'}}
